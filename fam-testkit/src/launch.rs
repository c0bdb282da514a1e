//! What every op's run has in common: plans, tensors in device memory with their traps, the filled ring.

use crate::case::{Case, KeySource};
use crate::data::{Data, Place, Role};
use crate::guard::{CANARY, Tensor};
use crate::harness::{Harness, Mem, Owned};
use crate::wild;
use fam_core::{Append, Backend, Error, Keys, Layout, Plan, Span, Spans, Spec, View, ViewMut};
use fam_ref::Array;
use std::borrow::{Borrow, BorrowMut};

/// Why a run has no result.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Stop {
    /// The backend does not serve the case, and said so when the plan was made.
    Skipped(String),
    /// An error after that, or a trap that went off.
    Failed(String),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error.to_string())
    }
}

/// The backend's plan type.
pub(crate) type PlanOf<H> = <<H as Harness>::Backend as Backend>::Plan;

/// Plans; what the backend does not serve is skipped.
pub(crate) fn plan<H: Harness + ?Sized>(h: &H, spec: &Spec) -> Result<PlanOf<H>, Stop> {
    h.backend().plan(spec).map_err(|error| match error {
        Error::Unsupported { .. } | Error::LimitExceeded { .. } => Stop::Skipped(error.to_string()),
        _ => Stop::Failed(error.to_string()),
    })
}

/// A tensor in device memory.
pub(crate) struct Loaded<H: Harness + ?Sized> {
    pub host: Tensor,
    mem: Owned<H>,
}

impl<H: Harness + ?Sized> Loaded<H> {
    pub fn new(h: &H, host: Tensor) -> Result<Self, Stop> {
        let limits = h.limits();
        if host.layout.elements().is_none_or(|e| e > limits.max_elements) {
            return Err(Stop::Skipped(format!("a tensor beyond {} elements", limits.max_elements)));
        }
        let mem = h.upload(&host.bytes)?;
        Ok(Loaded { host, mem })
    }

    /// An input, with `fill` in every byte that the call may not see.
    pub fn input(h: &H, case: &Case, data: &Data, role: Role, fill: u8) -> Result<Self, Stop> {
        Self::new(h, data.tensor(case, role, fill))
    }

    /// An output, not yet written.
    pub fn output(h: &H, layout: Layout) -> Result<Self, Stop> {
        Self::new(h, Tensor::new(layout, CANARY))
    }

    pub fn mem(&self) -> &Mem<H> {
        self.mem.borrow()
    }

    pub fn view(&self) -> View<'_, Mem<H>> {
        View::new(self.mem.borrow(), self.host.layout)
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, Mem<H>> {
        ViewMut::new(self.mem.borrow_mut(), self.host.layout)
    }

    /// Downloads the tensor; fails if a byte outside `rows` has changed.
    pub fn finish(self, h: &H, name: &str, rows: impl Iterator<Item = [usize; 3]>) -> Result<Tensor, Stop> {
        let bytes = h.download(&self.mem, self.host.bytes.len())?;
        let layout = self.host.layout;
        if let Some(at) = self.host.disturbed(&bytes, rows) {
            let (shape, stride, offset) = (layout.shape, layout.stride, layout.offset);
            return Err(Stop::Failed(format!(
                "{name}: byte {at}, no output of the call, was written (shape {shape:?}, strides {stride:?}, offset {offset})"
            )));
        }
        Ok(Tensor { layout, bytes })
    }

    /// Downloads an output of a case into an array of the call's values.
    pub fn values(self, h: &H, case: &Case, role: Role, name: &str) -> Result<Array<5>, Stop> {
        let places = case.places(role);
        let tensor = self.finish(h, name, places.iter().map(|p| p.tensor))?;
        let mut values = Array::zeros(case.sizes(role));
        for Place { value: [n, i, r], tensor: [tn, ti, tr] } in places {
            for head in 0..tensor.layout.shape[3] {
                tensor.get([tn, ti, tr, head], values.row_mut(&[n, i, r, head]));
            }
        }
        Ok(values)
    }
}

/// Spans on the host, or in device memory where the case wants them there: as they are before the kernel has clamped them.
pub(crate) struct LoadedSpans<'a, H: Harness + ?Sized> {
    host: &'a [Span],
    device: Option<Owned<H>>,
}

impl<'a, H: Harness + ?Sized> LoadedSpans<'a, H> {
    pub fn new(h: &H, case: &'a Case) -> Result<Self, Stop> {
        let device = case.device_spans.then(|| h.upload(bytemuck::cast_slice(&wild::spans(case)?))).transpose()?;
        Ok(LoadedSpans { host: &case.spans, device })
    }

    pub fn spans(&self) -> Spans<'_, Mem<H>> {
        match &self.device {
            None => Spans::Host(self.host),
            Some(mem) => Spans::Device { mem: mem.borrow(), batch: self.host.len() },
        }
    }
}

/// The keys of a case where its op reads them: linear caches, or a ring that `append` has filled.
pub(crate) enum LoadedKeys<H: Harness + ?Sized> {
    Linear(Box<[Loaded<H>; 2]>),
    Ring(Owned<H>),
}

impl<H: Harness + ?Sized> LoadedKeys<H> {
    pub fn new(h: &H, case: &Case, data: &Data, plan: &PlanOf<H>, fill: u8) -> Result<Self, Stop> {
        let k = Loaded::input(h, case, data, Role::K, fill)?;
        let v = Loaded::input(h, case, data, Role::V, fill)?;
        if case.keys == KeySource::Linear {
            return Ok(LoadedKeys::Linear(Box::new([k, v])));
        }
        let mut ring = h.upload(&vec![fill; plan.support().ring_bytes as usize])?;
        fill_ring(h, case, plan, (&k, &v), &mut ring)?;
        Ok(LoadedKeys::Ring(ring))
    }

    pub fn keys(&self) -> Keys<'_, Mem<H>> {
        match self {
            LoadedKeys::Linear(kv) => Keys::Strided { k: kv[0].view(), v: kv[1].view() },
            LoadedKeys::Ring(ring) => Keys::Ring(ring.borrow()),
        }
    }
}

/// The case's calls of `append`, with all streams' next chunks in one call each.
pub(crate) fn fill_ring<H: Harness + ?Sized>(
    h: &H,
    case: &Case,
    plan: &PlanOf<H>,
    (k, v): (&Loaded<H>, &Loaded<H>),
    ring: &mut Owned<H>,
) -> Result<(), Stop> {
    let chunks: Vec<_> = case.spans.iter().map(|s| case.chunks(s)).collect();
    let calls = chunks.iter().map(Vec::len).max().unwrap_or(0);
    let mut scratch = h.poisoned(plan.support().scratch_bytes)?;
    h.run(&mut |queue| {
        for c in 0..calls {
            let spans: Vec<Span> = case
                .spans
                .iter()
                .zip(&chunks)
                .map(|(span, chunks)| match chunks.get(c) {
                    Some(chunk) => Span::new(span.slot, chunk.start, chunk.len).with_origin(span.origin),
                    None => Span::new(span.slot, span.start, 0).with_origin(span.origin),
                })
                .collect();
            // Chunk c of every stream begins at row c·plan_rows.
            let part = |loaded: &Loaded<H>| {
                let mut layout = loaded.host.layout;
                layout.offset += c * case.plan_rows * layout.stride[2];
                layout.shape[2] = case.plan_rows;
                layout
            };
            let (k, v) = (View::new(k.mem(), part(k)), View::new(v.mem(), part(v)));
            let args = Append::new(Spans::Host(&spans)).rows(k, v, ring.borrow_mut());
            h.backend().append(plan, queue, args, scratch.borrow_mut())?;
        }
        Ok(())
    })?;
    Ok(())
}

/// A hash of results, bit for bit.
pub(crate) fn digest<'a>(arrays: impl Iterator<Item = &'a Array<5>>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for value in arrays.flat_map(|a| &a.data) {
        // NaN has many encodings; which one is nobody's business.
        let bits = if value.is_nan() { f64::NAN.to_bits() } else { value.to_bits() };
        hash = (hash ^ bits).wrapping_mul(0x100_0000_01b3).rotate_left(23);
    }
    hash
}
