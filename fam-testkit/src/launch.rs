//! What every op's run has in common: plans, tensors in device memory with their traps, the filled ring.

use crate::case::{Case, KeySource};
use crate::data::{Data, Place, Role};
use crate::guard::{CANARY, POISON, TAIL, Tensor, first_difference};
use crate::harness::{Harness, Mem, Owned};
use crate::rng::hash;
use crate::wild;
use fam_core::{Append, Backend, Device, Error, Keys, Layout, Plan, Span, Spans, Spec, View, ViewMut};
use fam_ref::Array;
use std::borrow::{Borrow, BorrowMut};

/// Why a run has no result.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Stop {
    /// The backend does not serve the case, and said so when the plan was made.
    Skipped(String),
    /// An error after that: "not served" must be said by the plan, and never later.
    Refused(Error),
    /// A wrong result, or a trap that went off.
    Failed(String),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Refused(error)
    }
}

/// The backend's plan type.
pub(crate) type PlanOf<H> = <<H as Harness>::Backend as Backend>::Plan;

/// Plans; what the backend does not serve is skipped. Nothing but this and a harness's own limits may skip.
pub(crate) fn plan<H: Harness + ?Sized>(h: &H, spec: &Spec) -> Result<PlanOf<H>, Stop> {
    h.backend().plan(spec).map_err(|error| match error {
        Error::Unsupported { .. } | Error::LimitExceeded { .. } => Stop::Skipped(error.to_string()),
        _ => Stop::Refused(error),
    })
}

/// Memory that the backend lays out itself (the ring, scratch), with bytes behind it that are not the backend's.
pub(crate) struct Region<H: Harness + ?Sized> {
    name: &'static str,
    mem: Owned<H>,
    bytes: usize,
    fill: u8,
}

impl<H: Harness + ?Sized> Region<H> {
    /// `bytes` bytes and the traps behind them, every one `fill`.
    pub fn new(h: &H, name: &'static str, bytes: u64, fill: u8) -> Result<Self, Stop> {
        let mem = h.upload(&vec![fill; bytes as usize + TAIL])?;
        Ok(Region { name, mem, bytes: bytes as usize, fill })
    }

    /// Scratch memory of a plan, of which nothing may be read before it is written.
    pub fn scratch(h: &H, plan: &PlanOf<H>) -> Result<Self, Stop> {
        Self::new(h, "scratch", plan.support().scratch_bytes, POISON)
    }

    pub fn mem(&self) -> &Mem<H> {
        self.mem.borrow()
    }

    pub fn mem_mut(&mut self) -> &mut Mem<H> {
        self.mem.borrow_mut()
    }

    /// Fails if a byte behind the region has changed.
    pub fn check(&self, h: &H) -> Result<(), Stop> {
        let mut tail = [0; TAIL];
        h.backend().download(self.mem(), self.bytes as u64, &mut tail)?;
        match tail.iter().position(|byte| *byte != self.fill) {
            None => Ok(()),
            Some(at) => Err(Stop::Failed(format!("{}: byte {at} behind its {} bytes was written", self.name, self.bytes))),
        }
    }

    /// Downloads the region, traps checked.
    pub fn download(&self, h: &H) -> Result<Vec<u8>, Stop> {
        self.check(h)?;
        Ok(h.download(&self.mem, self.bytes)?)
    }
}

/// Fails if an input of the call is no longer what it was.
fn same_bytes(name: &str, before: &[u8], after: &[u8]) -> Result<(), Stop> {
    match first_difference(before, after) {
        None => Ok(()),
        Some(at) => Err(Stop::Failed(format!("{name}: byte {at} of an input was written"))),
    }
}

/// A tensor in device memory.
pub(crate) struct Loaded<H: Harness + ?Sized> {
    pub name: &'static str,
    pub host: Tensor,
    mem: Owned<H>,
}

impl<H: Harness + ?Sized> Loaded<H> {
    pub fn new(h: &H, name: &'static str, host: Tensor) -> Result<Self, Stop> {
        let limits = h.limits();
        if host.layout.elements().is_none_or(|e| e > limits.max_elements) {
            return Err(Stop::Skipped(format!("a tensor beyond {} elements", limits.max_elements)));
        }
        let mem = h.upload(&host.bytes)?;
        Ok(Loaded { name, host, mem })
    }

    /// An input, with `fill` in every byte that the call may not see.
    pub fn input(h: &H, case: &Case, data: &Data, role: Role, fill: u8) -> Result<Self, Stop> {
        Self::new(h, role.name(), data.tensor(case, role, fill))
    }

    /// An output, not yet written.
    pub fn output(h: &H, name: &'static str, layout: Layout) -> Result<Self, Stop> {
        Self::new(h, name, Tensor::new(layout, CANARY))
    }

    /// An output of a case.
    pub fn result(h: &H, case: &Case, role: Role) -> Result<Self, Stop> {
        Self::output(h, role.name(), case.layout(role))
    }

    /// Fails if a byte of an input has changed.
    pub fn check(&self, h: &H) -> Result<(), Stop> {
        same_bytes(self.name, &self.host.bytes, &h.download(&self.mem, self.host.bytes.len())?)
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
    pub fn finish(self, h: &H, rows: impl Iterator<Item = [usize; 3]>) -> Result<Tensor, Stop> {
        let bytes = h.download(&self.mem, self.host.bytes.len())?;
        let layout = self.host.layout;
        if let Some(at) = self.host.disturbed(&bytes, rows) {
            let (shape, stride, offset) = (layout.shape, layout.stride, layout.offset);
            return Err(Stop::Failed(format!(
                "{}: byte {at}, no output of the call, was written (shape {shape:?}, strides {stride:?}, offset {offset})",
                self.name
            )));
        }
        Ok(Tensor { layout, bytes })
    }

    /// Downloads an output of a case into an array of the call's values.
    pub fn values(self, h: &H, case: &Case, role: Role) -> Result<Array<5>, Stop> {
        let places = case.places(role);
        let tensor = self.finish(h, places.iter().map(|p| p.tensor))?;
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
    device: Option<(Owned<H>, Vec<Span>)>,
}

impl<'a, H: Harness + ?Sized> LoadedSpans<'a, H> {
    pub fn new(h: &H, case: &'a Case) -> Result<Self, Stop> {
        let mut device = None;
        if case.device_spans {
            let wild = wild::spans(case)?;
            device = Some((h.upload(bytemuck::cast_slice(&wild))?, wild));
        }
        Ok(LoadedSpans { host: &case.spans, device })
    }

    pub fn spans(&self) -> Spans<'_, Mem<H>> {
        match &self.device {
            None => Spans::Host(self.host),
            Some((mem, _)) => Spans::Device { mem: mem.borrow(), batch: self.host.len() },
        }
    }

    /// Fails if a span has changed.
    pub fn check(&self, h: &H) -> Result<(), Stop> {
        let Some((mem, spans)) = &self.device else { return Ok(()) };
        let before: &[u8] = bytemuck::cast_slice(spans);
        same_bytes("spans", before, &h.download(mem, before.len())?)
    }
}

/// The keys of a case where its op reads them: linear caches, or a ring that `append` has filled, with the bytes it then had.
pub(crate) enum LoadedKeys<H: Harness + ?Sized> {
    Linear(Box<[Loaded<H>; 2]>),
    Ring(Region<H>, Vec<u8>),
}

impl<H: Harness + ?Sized> LoadedKeys<H> {
    pub fn new(h: &H, case: &Case, data: &Data, plan: &PlanOf<H>, fill: u8) -> Result<Self, Stop> {
        let k = Loaded::input(h, case, data, Role::K, fill)?;
        let v = Loaded::input(h, case, data, Role::V, fill)?;
        if case.keys == KeySource::Linear {
            return Ok(LoadedKeys::Linear(Box::new([k, v])));
        }
        let mut ring = Region::new(h, "ring", plan.support().ring_bytes, fill)?;
        fill_ring(h, case, plan, [&k, &v], &mut ring)?;
        let filled = ring.download(h)?;
        Ok(LoadedKeys::Ring(ring, filled))
    }

    pub fn keys(&self) -> Keys<'_, Mem<H>> {
        match self {
            LoadedKeys::Linear(kv) => Keys::Strided { k: kv[0].view(), v: kv[1].view() },
            LoadedKeys::Ring(ring, _) => Keys::Ring(ring.mem()),
        }
    }

    /// Fails if the op that reads the keys has written to them.
    pub fn check(&self, h: &H) -> Result<(), Stop> {
        match self {
            LoadedKeys::Linear(kv) => kv.iter().try_for_each(|loaded| loaded.check(h)),
            LoadedKeys::Ring(ring, filled) => same_bytes("ring", filled, &ring.download(h)?),
        }
    }
}

/// The case's calls of `append`, with all streams' next chunks in one call each.
pub(crate) fn fill_ring<H: Harness + ?Sized>(
    h: &H,
    case: &Case,
    plan: &PlanOf<H>,
    [k, v]: [&Loaded<H>; 2],
    ring: &mut Region<H>,
) -> Result<(), Stop> {
    let chunks: Vec<_> = case.spans.iter().map(|s| case.chunks(s)).collect();
    let calls = chunks.iter().map(Vec::len).max().unwrap_or(0);
    let mut scratch = Region::scratch(h, plan)?;
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
        h.run(&mut |queue| {
            let (k, v) = (View::new(k.mem(), part(k)), View::new(v.mem(), part(v)));
            let args = Append::new(Spans::Host(&spans)).rows(k, v, ring.mem_mut());
            h.backend().append(plan, queue, args, scratch.mem_mut())
        })?;
    }
    [k, v].into_iter().try_for_each(|loaded| loaded.check(h))?;
    scratch.check(h)
}

/// A hash of results, bit for bit: no output has more than 32.
pub(crate) fn digest<'a>(arrays: impl Iterator<Item = &'a Array<5>>) -> u64 {
    // NaN has many encodings; which one is nobody's business.
    let bits = |value: &f64| if value.is_nan() { f32::NAN.to_bits() } else { (*value as f32).to_bits() };
    hash(arrays.flat_map(|a| &a.data).map(|value| bits(value).into()))
}
