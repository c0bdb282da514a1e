//! Calls in the life of streams that must be refused: by the right error, and with nothing changed.

use super::{Life, Live};
use crate::guard::{POISON, Tensor};
use crate::harness::Harness;
use crate::launch::{Loaded, Stop};
use fam_core::{Error, Layout, Result, Step, StepInfini};

/// The argument that an error names, or its kind.
fn named(error: &Error) -> &'static str {
    match error {
        Error::Invalid { field: name, .. } | Error::LimitExceeded { what: name, .. } | Error::Malformed { what: name, .. } => {
            name
        }
        Error::MemoryDue { .. } => "memory due",
        Error::Poisoned { .. } => "poisoned",
        _ => "another kind of error",
    }
}

impl<H: Harness + ?Sized> Life<'_, H>
where
    H::Backend: Clone,
{
    /// Calls that must be refused and change nothing.
    pub(super) fn bad_calls(&mut self, slot: usize, live: Live) -> Result<(), Stop> {
        let s = self.shape;
        let b = s.block_len();
        let room = b - (self.position(&live) % b as u64) as usize;
        let (is_at_boundary, beyond) = (self.is_at_boundary(&live), self.slots.len() as u32);
        let before = self.snapshot(slot)?;
        let is_due = self.streams.memory_due(slot as u32)?.is_some();
        let rows = |heads, tokens| Layout::tokens(s.dtype(), [2, tokens, heads, s.head_dim()]);
        let tokens = Loaded::new(self.h, "tokens", Tensor::new(rows(s.heads(), b + 1), POISON))?;
        let beta = Loaded::new(self.h, "beta", Tensor::new(Layout::per_head(s.heads()), POISON))?;

        let Life { h, streams, plan, scratch, .. } = self;
        let slot = slot as u32;
        let mut found = Vec::new();
        h.run(&mut |queue| {
            let missing = if is_due { "memory due" } else { "k" };
            let tries: [(&'static str, &[u32], usize); 4] =
                [("slots", &[slot, slot], 1), ("slot", &[beyond], 1), ("len", &[slot], room + 1), (missing, &[slot], 0)];
            for (due, slots, count) in tries {
                let view = |heads| fam_core::View::new(tokens.mem(), rows(heads, count));
                let lens = vec![count.max(1) as u32; slots.len()];
                let mut step = Step::new(slots, view(s.kv_heads()), view(s.kv_heads())).lens(&lens);
                if s.infini().is_some() {
                    step = step.infini(StepInfini { q: view(s.heads()), k: view(s.kv_heads()), beta: beta.view() });
                }
                found.push((due, streams.step(plan, queue, step, scratch.mem_mut()).map(drop)));
            }
            if !is_at_boundary {
                found.push(("position", streams.keep_memory(&[slot])));
            }
            found.push(("tokens", streams.rollback(slot, b as u64 + 1)));
            let cut = &before[..before.len() - 1];
            found.push(("snapshot", streams.restore(plan, queue, slot, cut, scratch.mem_mut())));
            Ok(())
        })?;
        for (due, result) in found {
            match result {
                Err(error) if named(&error) == due => {}
                Err(error) => return Err(Stop::Failed(format!("an error about {due} was due, not: {error}"))),
                Ok(()) => return Err(Stop::Failed(format!("accepted; an error about {due} was due"))),
            }
        }
        match self.snapshot(slot as usize)? == before {
            true => Ok(()),
            false => Err(Stop::Failed("a refused call changed the slot".into())),
        }
    }
}
