//! The door of an op: what is checked of its arguments before anything is enqueued. Every `validate` opens one, leads its views through it
//! one by one, and closes it, which refuses outputs that overlap other arguments. Nothing is allocated but for an error.

use crate::span::Extent;
use crate::{Dtype, Error, Layout, Memory, Op, Plan, Result, Spans, Spec, View, ViewMut};

/// What an op expects of one of its views.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expect {
    /// Name in errors.
    pub field: &'static str,
    pub dtype: Dtype,
    /// Least size of `[batch, blocks, rows]`; more is allowed and not touched.
    pub at_least: [usize; 3],
    /// Exact size of `[heads, head_dim]`.
    pub exactly: [usize; 2],
}

impl Expect {
    /// The same under another name.
    pub fn named(self, field: &'static str) -> Self {
        Expect { field, ..self }
    }

    /// The same in another type.
    pub fn dtype(self, dtype: Dtype) -> Self {
        Expect { dtype, ..self }
    }

    /// The same in whichever of f32 and `dtype` the view has.
    pub fn wide<M: ?Sized>(self, dtype: Dtype, view: &View<'_, M>) -> Result<Self> {
        match view.layout.dtype {
            have if have == dtype || have == Dtype::F32 => Ok(self.dtype(have)),
            have => Err(Error::invalid(self.field, have, format!("dtype f32 or {dtype}"))),
        }
    }

    /// The same with one element a head: a log-sum-exp.
    pub fn per_row(self, field: &'static str) -> Self {
        Expect { field, dtype: Dtype::F32, exactly: [self.exactly[0], 1], ..self }
    }

    /// `[heads]` of f32: a sink, or β.
    pub fn per_head(field: &'static str, heads: usize) -> Self {
        Expect { field, dtype: Dtype::F32, at_least: [1, 1, 1], exactly: [heads, 1] }
    }
}

/// A name, the memory and the layout in it (`None`: all of it).
type Argument<'v, M> = (&'static str, &'v M, Option<&'v Layout>);

/// Arguments that came through; no op has more of a kind.
const MOST: usize = 24;

/// The arguments that were checked so far.
pub(crate) struct Door<'v, M: ?Sized> {
    outputs: List<'v, M>,
    inputs: List<'v, M>,
}

struct List<'v, M: ?Sized> {
    arguments: [Option<Argument<'v, M>>; MOST],
    count: usize,
}

impl<'v, M: ?Sized> List<'v, M> {
    const EMPTY: Self = List { arguments: [None; MOST], count: 0 };

    fn push(&mut self, argument: Argument<'v, M>) {
        self.arguments[self.count] = Some(argument);
        self.count += 1;
    }
}

impl<'v, M: Memory + ?Sized> Door<'v, M> {
    /// Of an op without scratch memory.
    pub fn new() -> Self {
        Door { outputs: List::EMPTY, inputs: List::EMPTY }
    }

    /// Of `op`, which the plan must have been made for, with the call's scratch memory.
    pub fn open(plan: &impl Plan, op: Op, scratch: &'v M) -> Result<Self> {
        let ops = plan.spec().ops();
        if !ops.contains(&op) {
            let ops: Vec<_> = ops.iter().map(|op| op.name()).collect();
            return Err(Error::unsupported("op of this plan", op, format!("{} (see SpecBuilder::ops)", ops.join(", "))));
        }
        check_bytes("scratch", scratch, plan.support().scratch_bytes)?;
        let mut door = Door::new();
        door.outputs.push(("scratch", scratch, None));
        Ok(door)
    }

    /// The call's spans, and the sizes that they ask of its views.
    pub fn spans(&mut self, spans: &Spans<'v, M>, spec: &Spec) -> Result<Extent> {
        let extent = spans.validate(spec)?;
        if let Spans::Device { mem, .. } = *spans {
            self.inputs.push(("spans", mem, None));
        }
        Ok(extent)
    }

    /// An input.
    pub fn input(&mut self, expect: Expect, view: &'v View<'_, M>) -> Result<()> {
        check_layout(&expect, &view.layout, view.mem)?;
        self.inputs.push((expect.field, view.mem, Some(&view.layout)));
        Ok(())
    }

    /// An output.
    pub fn output(&mut self, expect: Expect, view: &'v ViewMut<'_, M>) -> Result<()> {
        check_layout(&expect, &view.layout, &*view.mem)?;
        if view.layout.is_repeating() {
            let strides = format!("{:?} for sizes {:?}", view.layout.stride, view.layout.shape);
            return Err(Error::invalid(expect.field, strides, "the elements of an output must be distinct"));
        }
        self.outputs.push((expect.field, &*view.mem, Some(&view.layout)));
        Ok(())
    }

    /// A key ring that is read.
    pub fn ring(&mut self, ring: &'v M, plan: &impl Plan) -> Result<()> {
        if plan.spec().ring_rows() == 0 {
            let rule = "linear caches: the plan was made without append, and so without a ring";
            return Err(Error::invalid("keys", "a ring", rule));
        }
        check_ring(ring, plan)?;
        self.inputs.push(("ring", ring, None));
        Ok(())
    }

    /// A key ring that is written.
    pub fn ring_mut(&mut self, ring: &'v M, plan: &impl Plan) -> Result<()> {
        check_ring(ring, plan)?;
        self.outputs.push(("ring", ring, None));
        Ok(())
    }

    /// Refuses an output whose bytes overlap another argument's, where memory has a [`Memory::place`].
    pub fn close(self) -> Result<()> {
        let (outputs, inputs) = (self.outputs.arguments, self.inputs.arguments);
        for (i, output) in outputs.iter().enumerate() {
            let Some((field, Place { buffer, start, end })) = output.and_then(|o| Some((o.0, place(o)?))) else { continue };
            for other in outputs[i + 1..].iter().chain(&inputs).flatten() {
                if place(*other).is_some_and(|p| p.buffer == buffer && p.start < end && start < p.end) {
                    return Err(Error::invalid(field, format!("bytes {start}..{end}"), format!("no overlap with {}", other.0)));
                }
            }
        }
        Ok(())
    }
}

/// Bytes of a buffer.
struct Place {
    buffer: u64,
    start: u64,
    end: u64,
}

/// Where an argument's elements lie; `None` where nobody asks, or where there are none.
fn place<M: Memory + ?Sized>((_, mem, layout): Argument<'_, M>) -> Option<Place> {
    let (buffer, first) = mem.place()?;
    let (start, end) = match layout {
        None => (0, mem.bytes()),
        // Not empty: then the offset lies inside the memory.
        Some(l) => match l.end_bytes()? {
            0 => return None,
            end => ((l.offset * l.dtype.bytes()) as u64, end),
        },
    };
    (start < end).then_some(Place { buffer, start: first + start, end: first + end })
}

fn check_layout<M: Memory + ?Sized>(expect: &Expect, layout: &Layout, mem: &M) -> Result<()> {
    let Expect { field, dtype, at_least, exactly } = *expect;
    if layout.dtype != dtype {
        return Err(Error::invalid(field, layout.dtype, format!("dtype {dtype}")));
    }
    let [batch, blocks, rows, heads, head_dim] = layout.shape;
    let sizes = [batch, blocks, rows];
    if [heads, head_dim] != exactly || sizes.iter().zip(at_least).any(|(&have, need)| have < need) {
        let ([n, t, r], [h, d]) = (at_least, exactly);
        let rule = format!("[batch >= {n}, blocks >= {t}, rows >= {r}, heads = {h}, head_dim = {d}]");
        return Err(Error::invalid(field, format!("{:?}", layout.shape), rule));
    }
    check_aligned(field, mem, dtype)?;
    let bytes = mem.bytes();
    let rule = match layout.end_bytes() {
        Some(end) if end <= bytes => return Ok(()),
        Some(end) => format!("at least {end} bytes for shape, strides and offset"),
        None => "shape, strides and offset within 64 bits".into(),
    };
    Err(Error::invalid(field, format!("{bytes} bytes"), rule))
}

/// Refuses memory whose elements would not be aligned for their type. Offsets count elements, so the first byte decides.
fn check_aligned<M: Memory + ?Sized>(field: &'static str, mem: &M, dtype: Dtype) -> Result<()> {
    if mem.is_aligned(dtype) {
        return Ok(());
    }
    let rule = format!("at an address that {dtype} may have: a multiple of {}", dtype.bytes());
    Err(Error::invalid(field, "misaligned memory", rule))
}

fn check_ring<M: Memory + ?Sized>(ring: &M, plan: &impl Plan) -> Result<()> {
    check_aligned("ring", ring, plan.spec().shape().kv_dtype())?;
    check_bytes("ring", ring, plan.support().ring_bytes)
}

/// Checks the size of memory that an op uses whole: a key ring, or scratch.
fn check_bytes<M: Memory + ?Sized>(field: &'static str, mem: &M, need: u64) -> Result<()> {
    if mem.bytes() < need {
        return Err(Error::invalid(field, format!("{} bytes", mem.bytes()), format!("at least the plan's {need} bytes")));
    }
    Ok(())
}
