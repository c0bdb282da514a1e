//! Properties of single calls of `attend`: 3, 4, 5, 7, 9.

use super::{same_bits, suitable, with_window};
use crate::attend::{Outputs, check, launch};
use crate::case::{Case, KeySource};
use crate::data::{Data, Role};
use crate::guard::POISON;
use crate::harness::Harness;
use crate::launch::Stop;
use crate::rng::Rng;
use crate::runner::{Passed, conclude};
use crate::tolerance::Level;
use fam_core::{Shape, Span, Window};

/// Runs a case and holds it against the reference.
fn right<H: Harness + ?Sized>(h: &H, case: &Case, data: &Data) -> Result<(Outputs, Passed), Stop> {
    let outputs = launch(h, case, data, POISON)?;
    let limits = h.limits();
    let passed = conclude(case, check(case, data, &outputs, Level::Hard, &limits)?, 0)?;
    Ok((outputs, passed))
}

/// 3: both row groups in one call, each in its own: the same reference holds all.
pub(super) fn row_groups<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    let both = suitable(seed, |c| c.rows && c.mem_rows);
    let data = Data::new(&both);
    let (_, passed) = right(h, &both, &data)?;
    right(h, &Case { mem_rows: false, ..both.clone() }, &data)?;
    right(h, &Case { rows: false, ..both.clone() }, &data)?;
    Ok(passed)
}

/// 4: a layer without memory rows gives what one whose memory is absent gives.
pub(super) fn no_memory<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    let mut with = suitable(seed, |c| c.rows && c.shape.mem_len() > 0);
    with.spans.iter_mut().for_each(|s| s.mem_rows = 0);
    let s = &with.shape;
    let builder = Shape::builder()
        .heads(s.heads())
        .kv_heads(s.kv_heads())
        .head_dim(s.head_dim())
        .block_len(s.block_len())
        .window(s.window())
        .dtype(s.dtype())
        .scale(s.scale());
    let shape = s.infini().map_or(builder.clone(), |rule| builder.infini(rule)).build()?;
    let without = Case { shape, mem_rows: false, ..with.clone() };
    let with = Case { mem_rows: false, ..with };
    let (data, same) = (Data::new(&with), Data::new(&without));
    // The reference of the one holds the results of the other.
    let outputs = launch(h, &without, &same, POISON)?;
    let limits = h.limits();
    conclude(&with, check(&with, &data, &outputs, Level::Hard, &limits)?, 0)
}

/// 5, bitwise.
pub(super) fn unseen<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    // From linear caches, which begin at the origin.
    let base = suitable(seed, |c| c.rows && c.mem_rows && c.blocks() > 0 && c.spans.iter().all(|s| s.start - s.origin < 1 << 15));
    // Memory rows ignore the window.
    let long = with_window(&base, Window::Blocks(3))?;
    let data = Data::new(&long);
    let whole = launch(h, &long, &data, POISON)?;
    for window in [Window::Blocks(0), Window::Tokens(1)] {
        let short = with_window(&base, window)?;
        let other = launch(h, &short, &data.seen_by(&long, &short), POISON)?;
        let memory = |o: &Outputs| o.mem_rows.clone().into_iter().flat_map(|g| [Some(g.o), g.lse]).flatten().collect::<Vec<_>>();
        same_bits("memory rows under another window", memory(&whole).iter(), memory(&other).iter())?;
    }
    // A block row ignores later keys.
    let mut rng = Rng::of(seed, "cut");
    let cuts: Vec<u64> = base.spans.iter().map(|s| s.start + rng.below(s.len.max(1) as usize) as u64).collect();
    let mut changed = data.clone();
    for (n, span) in long.spans.iter().enumerate() {
        let first = long.first_key(span);
        for position in (cuts[n] + 1).max(first)..span.end() {
            for role in [Role::K, Role::V] {
                let row = changed.get_mut(role).row_mut(&[n, 0, (position - first) as usize]);
                row.iter_mut().for_each(|x| *x = -0.5 * x.signum());
            }
        }
    }
    let other = launch(h, &long, &changed, POISON)?;
    let before_cut = |o: &Outputs| {
        let mut rows = o.rows.clone().map(|g| g.o);
        if let Some(rows) = &mut rows {
            for (n, span) in long.spans.iter().enumerate() {
                (0..span.len as usize)
                    .filter(|&r| span.start + r as u64 > cuts[n])
                    .for_each(|r| rows.row_mut(&[n, 0, r]).fill(0.0));
            }
        }
        rows
    };
    same_bits("block rows under other later keys", before_cut(&whole).iter(), before_cut(&other).iter())?;
    Ok(Passed::default())
}

/// 7, bitwise.
pub(super) fn order<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    let base = suitable(seed, |c| c.batch() > 1);
    let data = Data::new(&base);
    let outputs = launch(h, &base, &data, POISON)?;
    let mut order: Vec<usize> = (0..base.batch()).collect();
    let mut slots: Vec<u32> = (0..base.slots as u32).collect();
    let mut rng = Rng::of(seed, "order");
    rng.shuffle(&mut order);
    rng.shuffle(&mut slots);
    let alone = (0..base.batch()).map(|n| vec![n]);
    for order in std::iter::once(order.clone()).chain(alone) {
        let spans = order.iter().map(|&n| Span { slot: slots[n], ..base.spans[n] }).collect();
        let case = Case { spans, ..base.clone() };
        let other = launch(h, &case, &data.streams(&order), POISON)?;
        for (a, b) in outputs.arrays().zip(other.arrays()) {
            for (m, &n) in order.iter().enumerate() {
                let (a, b) = (a.row(&[n]), b.row(&[m]));
                // A shorter batch has shorter arrays: the rows that both have.
                if a.iter().zip(b).any(|(x, y)| x.to_bits() != y.to_bits()) {
                    return Err(Stop::Failed(format!("{base}: stream {n} differs in order {order:?} and slots {slots:?}")));
                }
            }
        }
    }
    Ok(Passed::default())
}

/// 9, bitwise.
pub(super) fn poison<H: Harness + ?Sized>(h: &H, seed: u64) -> Result<Passed, Stop> {
    let case = suitable(seed, |c| c.keys == KeySource::Ring || c.batch() > 1);
    let data = Data::new(&case);
    let outputs = launch(h, &case, &data, POISON)?;
    for fill in [POISON, 0, 0x3C] {
        let other = launch(h, &case, &data, fill)?;
        same_bits(&format!("{case}: unseen bytes {fill:#x}"), outputs.arrays(), other.arrays())?;
    }
    Ok(Passed::default())
}
