//! What the suite runs beside generated cases of single ops: recorded activations, calls that must be refused, the properties of the
//! contract, streams.

use super::{Args, Tally};
use crate::Failure;
use crate::report::Report;
use crate::run::SAMPLES;
use fam_testkit::{CaseFile, Harness, Mode, PROPERTIES, Reference, case_seed, invalid_calls, replay, run_property, run_streams};

/// Of ten generated cases, one more is a property and one a stream's life.
const SHARE: u64 = 10;

pub fn run<H: Harness>(h: &H, args: &Args, report: &Report, tally: &mut Tally) -> Result<(), Failure>
where
    H::Backend: Clone,
{
    let (shard, shards) = args.shard;
    if shard == 0 {
        samples(h, report, tally)?;
        for (name, outcome) in invalid_calls(h) {
            tally.add(report, &format!("a call that must be refused: {name}"), args.seed, &outcome);
        }
    }
    let numbers = || (0..args.cases.div_ceil(SHARE)).filter(move |i| i % shards == shard);

    let bar = report.progress(2 * numbers().count() as u64, "properties and streams");
    for i in numbers() {
        let property = PROPERTIES[i as usize % PROPERTIES.len()];
        let seed = case_seed(args.seed, i);
        tally.add(report, &format!("property {property}"), seed, &run_property(h, property, seed));
        tally.add(report, "streams", seed, &run_streams(h, seed));
        bar.inc(2);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Every property, and the life of streams, that a seed decides.
pub fn of_seed<H: Harness>(h: &H, seed: u64, report: &Report, tally: &mut Tally)
where
    H::Backend: Clone,
{
    for property in PROPERTIES {
        tally.add(report, &format!("property {property}"), seed, &run_property(h, property, seed));
    }
    tally.add(report, "streams", seed, &run_streams(h, seed));
}

/// Real activations, in every mode, against the reference and results computed elsewhere.
fn samples<H: Harness>(h: &H, report: &Report, tally: &mut Tally) -> Result<(), Failure>
where
    H::Backend: Clone,
{
    for (name, bytes) in SAMPLES {
        let case = CaseFile::read(bytes)?;
        let reference = Reference::new(&case);
        for mode in Mode::ALL {
            let case_name = format!("sample {name}, {mode}");
            match replay(h, &case, mode) {
                Err(fam::Error::Unsupported { what, got, .. }) => tally.skip(format!("{what} = {got}")),
                Err(error) => tally.fail(report, &case_name, &error.to_string()),
                Ok(outputs) => match reference.judge(&case, &outputs, &h.limits()).wrong {
                    None => tally.pass(),
                    Some((wrong, edges)) => tally.fail(report, &case_name, &format!("{wrong} ({edges})")),
                },
            }
        }
    }
    Ok(())
}
