//! Spans in device memory that only [`Span::clamped`] makes valid. Nobody checks what a captured graph finds in its buffer.

use crate::case::Case;
use crate::rng::Rng;
use fam_core::{Op, Result, Span, Spec};

/// The spans of a case as its device buffer holds them: other numbers, the same rows touched.
///
/// # Errors
/// None for a generated case.
pub(crate) fn spans(case: &Case) -> Result<Vec<Span>> {
    let spec = case.spec()?;
    let mut rng = Rng::of(case.seed, "wild spans");
    Ok(case.spans.iter().map(|span| wild(case, &spec, *span, &mut rng)).collect())
}

fn wild(case: &Case, spec: &Spec, span: Span, rng: &mut Rng) -> Span {
    // Above `least`: the next number, one anywhere, or the last.
    let above = |least: u32, rng: &mut Rng| {
        let anywhere = least + rng.below((u32::MAX - least) as usize) as u32 + 1;
        rng.pick(&[least + 1, anywhere, u32::MAX])
    };
    // The same entry, counted on.
    let again = |entry: u32, entries: usize, rng: &mut Rng| {
        let most = (u32::MAX - entry) as usize / entries;
        let times = [0, 1, rng.below(most), most];
        entry + (rng.pick(&times) * entries) as u32
    };
    let mut wild = span;
    if touched(case, span).is_none() && rng.chance(1, 2) {
        match rng.below(3) {
            0 => wild.slot = above(case.slots as u32 - 1, rng),
            1 => wild.origin = rng.pick(&[span.start + 1, u64::MAX]),
            _ => wild.start = rng.pick(&[u64::MAX / 2 + 1, u64::MAX]),
        }
        // None of it is looked at then.
        (wild.len, wild.mem_rows) = rng.pick(&[(0, 0), (1, 1), (u32::MAX, u32::MAX)]);
        return wild;
    }
    for is_len in [true, false] {
        let longer = match is_len {
            true => Span { len: above(wild.len, rng), ..wild },
            false => Span { mem_rows: above(wild.mem_rows, rng), ..wild },
        };
        if rng.chance(3, 4) && touched(case, longer.clamped(spec)) == touched(case, span) {
            wild = longer;
        }
    }
    wild.mem_entry = again(span.mem_entry, case.mem_entries, rng);
    wild.state_entry = again(span.state_entry, case.state_entries, rng);
    wild
}

/// What a call does with a span: its rows and entries, or nothing at all.
fn touched(case: &Case, span: Span) -> Option<Span> {
    // Without tokens only `append` still does something: it stores memory rows.
    let is_nothing = span.len == 0 && (case.op != Op::Append || span.mem_rows == 0);
    let entry = |entry: u32, entries: usize| (entry as usize % entries) as u32;
    let (mem_entry, state_entry) = (entry(span.mem_entry, case.mem_entries), entry(span.state_entry, case.state_entries));
    (!is_nothing).then_some(Span { mem_entry, state_entry, ..span })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case_seed;

    /// Every field is wild somewhere, and the clamped span never touches anything else.
    #[test]
    fn clamping_restores_what_is_touched() {
        let [mut empty, mut len, mut mem_rows, mut entries] = [0; 4];
        let cases = (0..10_000).map(|i| Case::from_seed(case_seed(1, i)));
        for case in cases.filter(|case| case.device_spans) {
            let spec = case.spec().unwrap();
            for (wild, span) in spans(&case).unwrap().into_iter().zip(&case.spans) {
                assert_eq!(touched(&case, wild.clamped(&spec)), touched(&case, *span), "{wild:?} {case}");
                let is_refused = wild.slot != span.slot || wild.origin != span.origin || wild.start != span.start;
                empty += u32::from(is_refused);
                len += u32::from(!is_refused && span.len > 0 && wild.len != span.len);
                mem_rows += u32::from(!is_refused && span.len > 0 && wild.mem_rows != span.mem_rows);
                entries += u32::from(wild.mem_entry != span.mem_entry && wild.state_entry != span.state_entry);
            }
        }
        assert!(empty > 10 && len > 100 && mem_rows > 100 && entries > 100, "{empty} {len} {mem_rows} {entries}");
    }
}
