//! Case files: a problem and, optionally, its expected results in one safetensors file. The format is the page of [`CaseFile`].

mod tensors;

use fam_core::{Dtype, Error, InfiniRule, Result, Shape, Window};
use safetensors::SafeTensors;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
pub use tensors::Tensor;
use tensors::{FILE, Header, Tensors, file_dtype};
pub(crate) use tensors::{Stored, serialize};

/// The largest `start` of a stream.
pub(crate) const MAX_START: u64 = u64::MAX / 4;

/// Names of the results, in the order of reports.
pub const OUTPUTS: [&str; 6] = ["o", "lse", "mem_o", "mem_lse", "m", "z"];

/// The most elements of m that a file may ask for: 1 GiB.
const MAX_STATE: u64 = 1 << 28;

/// The compressive memory's part of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct InfiniCase {
    /// How segments are written.
    pub rule: InfiniRule,
    /// Queries without rotary positions, as q; `None`: q serves.
    pub q: Option<Tensor>,
    /// Keys without rotary positions, as k; `None`: k serves.
    pub k: Option<Tensor>,
    /// `[Hq]` of f32.
    pub beta: Tensor,
    /// `[N, Hkv, D, D]` of f32 before the first token; `None`: 0.
    pub m0: Option<Tensor>,
    /// `[N, Hkv, D]` of f32; `None`: 0.
    pub z0: Option<Tensor>,
}

/// A valid case file.
#[doc = include_str!("../casefile.md")]
#[derive(Clone, Debug, PartialEq)]
pub struct CaseFile {
    /// Sizes, window, scale and dtype.
    pub shape: Shape,
    /// N.
    pub batch: usize,
    /// L: tokens of q, k and v for each stream.
    pub tokens: usize,
    /// Tokens of each stream, at most L.
    pub lengths: Vec<u64>,
    /// Position of each stream's first token. Earlier keys do not exist.
    pub start: Vec<u64>,
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// Queries of the memory rows.
    pub mem_q: Option<Tensor>,
    /// Keys and values of the memory rows.
    pub mem: Option<(Tensor, Tensor)>,
    /// Sink logits.
    pub sink: Option<Tensor>,
    /// With op = "infini".
    pub infini: Option<InfiniCase>,
    /// Expected results by output name (without `expected_`), of f32.
    pub expected: BTreeMap<String, Tensor>,
    /// Where the data come from.
    pub source: String,
}

/// A metadata value that must be there and be a number.
fn number<T: std::str::FromStr>(metadata: &HashMap<String, String>, name: &'static str) -> Result<Option<T>> {
    let Some(text) = metadata.get(name) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| Error::invalid(name, text, "a number"))
}

impl CaseFile {
    /// Reads and checks a case file of the bytes `bytes`.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Invalid`] or [`Error::LimitExceeded`], naming field, value and rule, before any tensor is copied.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let Header { metadata, entries } = Header::read(bytes)?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| Error::malformed(FILE, e.to_string()))?;
        let mut tensors = Tensors { file, entries };
        let text = |name: &'static str| metadata.get(name).map(String::as_str);
        if text("format") != Some("1") {
            return Err(Error::invalid("format", text("format").unwrap_or("absent"), "\"1\""));
        }
        let infini = match text("op") {
            Some("attend") => false,
            Some("infini") => true,
            other => return Err(Error::invalid("op", other.unwrap_or("absent"), "\"attend\" or \"infini\"")),
        };
        if let Some(name) = tensors.entries.keys().find(|name| !is_known(name, infini)) {
            let op = if infini { "infini" } else { "attend" };
            return Err(Error::invalid("tensor", name, format!("a tensor of op {op}; names of your own start with x_")));
        }

        // Sizes: from q, k and the memory rows, before anything is read.
        let [batch, tokens, heads, head_dim] = tensors.sizes("q")?;
        let [_, _, kv_heads, _] = tensors.sizes("k")?;
        if batch == 0 || tokens == 0 {
            // Also: the other sizes of an empty tensor cost the file nothing, and may claim anything.
            let value = format!("shape {:?}", [batch, tokens, heads, head_dim]);
            return Err(Error::invalid("q", value, "at least one stream of one token"));
        }
        // A state grows with the square of head_dim, its file only with head_dim.
        let state = [batch, kv_heads, head_dim, head_dim].iter().try_fold(1u64, |n, &s| n.checked_mul(s as u64));
        if infini && state.is_none_or(|elements| elements > MAX_STATE) {
            return Err(Error::LimitExceeded { what: "elements of m", requested: state.unwrap_or(u64::MAX), max: MAX_STATE });
        }
        let mem_len = ["mem_q", "mem_k"].into_iter().find(|name| tensors.entries.contains_key(*name));
        let mem_len = mem_len.map_or(Ok(0), |name| tensors.sizes(name).map(|[_, _, mem_len, _, _]| mem_len))?;
        let dtype = match tensors.entries["q"].dtype.as_str() {
            "F32" => Dtype::F32,
            "F16" => Dtype::F16,
            "BF16" => Dtype::Bf16,
            other => return Err(Error::invalid("q", other, "dtype F32, F16 or BF16")),
        };
        let block_len = number(&metadata, "block_len")?.ok_or_else(|| Error::invalid("block_len", "absent", "a number"))?;
        let window = match (number(&metadata, "window_blocks")?, number(&metadata, "window_tokens")?) {
            (Some(m), None) => Window::Blocks(m),
            (None, Some(w)) => Window::Tokens(w),
            (Some(_), Some(_)) => return Err(Error::invalid("window_tokens", "beside window_blocks", "exactly one of the two")),
            (None, None) => return Err(Error::invalid("window_blocks", "absent", "exactly one of window_blocks, window_tokens")),
        };
        let mut shape = Shape::builder().heads(heads).kv_heads(kv_heads).head_dim(head_dim).block_len(block_len);
        shape = shape.window(window).mem_len(mem_len).dtype(dtype);
        if let Some(scale) = number::<f64>(&metadata, "scale")? {
            shape = shape.scale(scale as f32);
        }
        let rule = match (infini, text("rule")) {
            (false, _) => None,
            (true, Some("linear")) => Some(InfiniRule::Linear),
            (true, Some("delta")) => Some(InfiniRule::Delta),
            (true, other) => return Err(Error::invalid("rule", other.unwrap_or("absent"), "\"linear\" or \"delta\"")),
        };
        if let Some(rule) = rule {
            shape = shape.infini(rule);
        }
        let shape = shape.build()?;

        let start = tensors.integers("start", batch)?.unwrap_or_else(|| vec![0; batch]);
        if let Some(&late) = start.iter().find(|&&s| s > MAX_START) {
            return Err(Error::LimitExceeded { what: "start", requested: late, max: MAX_START });
        }
        let lengths = tensors.integers("lengths", batch)?.unwrap_or_else(|| vec![tokens as u64; batch]);
        if let Some(long) = lengths.iter().find(|&&l| l > tokens as u64) {
            return Err(Error::invalid("lengths", long, format!("at most L = {tokens}")));
        }
        let blocks = case_blocks(&start, tokens, block_len);

        let (q_rows, kv_rows) = ([batch, tokens, heads, head_dim], [batch, tokens, kv_heads, head_dim]);
        let (mem_q_rows, mem_kv_rows) = ([batch, blocks, mem_len, heads, head_dim], [batch, blocks, mem_len, kv_heads, head_dim]);
        let mem = (tensors.take("mem_k", dtype, &mem_kv_rows, 2)?, tensors.take("mem_v", dtype, &mem_kv_rows, 2)?);
        let mem = match mem {
            (Some(k), Some(v)) => Some((k, v)),
            (None, None) => None,
            (k, _) => {
                let absent = if k.is_none() { "mem_k" } else { "mem_v" };
                return Err(Error::invalid(absent, "absent", "mem_k and mem_v come together"));
            }
        };
        let infini = rule
            .map(|rule| -> Result<_> {
                let state = [batch, kv_heads, head_dim, head_dim];
                Ok(InfiniCase {
                    rule,
                    q: tensors.take("infini_q", dtype, &q_rows, 0)?,
                    k: tensors.take("infini_k", dtype, &kv_rows, 0)?,
                    beta: tensors.require("beta", Dtype::F32, &[heads])?,
                    m0: tensors.take("m0", Dtype::F32, &state, 0)?,
                    z0: tensors.take("z0", Dtype::F32, &state[..3], 0)?,
                })
            })
            .transpose()?;
        let mut expected = BTreeMap::new();
        for (name, tensor) in EXPECTED.into_iter().zip(OUTPUTS) {
            if let Some(found) = tensors.take(name, Dtype::F32, &output_shape(&shape, batch, tokens, blocks, tensor), 0)? {
                expected.insert(tensor.to_string(), found);
            }
        }
        Ok(CaseFile {
            q: tensors.require("q", dtype, &q_rows)?,
            k: tensors.require("k", dtype, &kv_rows)?,
            v: tensors.require("v", dtype, &kv_rows)?,
            mem_q: tensors.take("mem_q", dtype, &mem_q_rows, 2)?,
            sink: tensors.take("sink", Dtype::F32, &[heads], 0)?,
            source: text("source").unwrap_or_default().to_string(),
            shape,
            batch,
            tokens,
            lengths,
            start,
            mem,
            infini,
            expected,
        })
    }

    /// Reads and checks the case file at `path`.
    ///
    /// # Errors
    /// As [`CaseFile::read`]; [`Error::Malformed`] where the file cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(&read_file(path.as_ref())?)
    }

    /// The same problem with q, k, v and what belongs to them rounded to `dtype`, without expected results.
    ///
    /// # Errors
    /// Those of [`Shape::builder`].
    pub fn with_dtype(mut self, dtype: Dtype) -> Result<Self> {
        let s = self.shape;
        let mut shape = Shape::builder().heads(s.heads()).kv_heads(s.kv_heads()).head_dim(s.head_dim()).block_len(s.block_len());
        shape = shape.window(s.window()).mem_len(s.mem_len()).scale(s.scale()).dtype(dtype);
        if let Some(rule) = s.infini() {
            shape = shape.infini(rule);
        }
        self.shape = shape.build()?;
        let rounded = |t: &mut Tensor| *t = Tensor::from_values(dtype, t.shape.clone(), t.values());
        [&mut self.q, &mut self.k, &mut self.v].into_iter().chain(&mut self.mem_q).for_each(rounded);
        self.mem.iter_mut().flat_map(|(k, v)| [k, v]).for_each(rounded);
        self.infini.iter_mut().flat_map(|i| i.q.iter_mut().chain(&mut i.k)).for_each(rounded);
        self.expected.clear();
        Ok(self)
    }

    /// nb: blocks that the tokens touch, from the earliest start inside a block.
    pub fn blocks(&self) -> usize {
        case_blocks(&self.start, self.tokens, self.shape.block_len())
    }

    /// Whether the case asks for an output: `mem_o` and `mem_lse` only where it has `mem_q`, m and z only with op infini.
    pub fn has_output(&self, name: &str) -> bool {
        match name {
            "o" | "lse" => true,
            "mem_o" | "mem_lse" => self.mem_q.is_some(),
            "m" | "z" => self.infini.is_some(),
            _ => false,
        }
    }

    /// The sizes of an output.
    pub fn output_shape(&self, name: &str) -> Vec<usize> {
        output_shape(&self.shape, self.batch, self.tokens, self.blocks(), name)
    }

    /// The file as bytes.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the tensors cannot be written.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let expected = self.expected.iter().map(|(name, t)| (format!("expected_{name}"), Stored::of(t)));
        serialize(Some(self.metadata()?), self.inputs().into_iter().chain(expected))
    }

    /// What the file says in words.
    pub(crate) fn metadata(&self) -> Result<HashMap<String, String>> {
        let mut metadata = HashMap::from([("format".to_string(), "1".to_string())]);
        let mut set = |name: &str, value: String| metadata.insert(name.into(), value);
        set("op", if self.infini.is_some() { "infini" } else { "attend" }.into());
        set("block_len", self.shape.block_len().to_string());
        match self.shape.window() {
            Window::Tokens(w) => set("window_tokens", w.to_string()),
            Window::Blocks(m) => set("window_blocks", m.to_string()),
            other => return Err(Error::unsupported("window", format!("{other:?}"), "Blocks or Tokens")),
        };
        set("scale", self.shape.scale().to_string());
        set("source", self.source.clone());
        if let Some(infini) = &self.infini {
            set("rule", if infini.rule == InfiniRule::Delta { "delta" } else { "linear" }.into());
        }
        Ok(metadata)
    }

    /// All tensors but the expected ones.
    pub(crate) fn inputs(&self) -> Vec<(String, Stored)> {
        let infini = self.infini.as_ref();
        let named = [
            ("q", Some(&self.q)),
            ("k", Some(&self.k)),
            ("v", Some(&self.v)),
            ("mem_q", self.mem_q.as_ref()),
            ("mem_k", self.mem.as_ref().map(|(k, _)| k)),
            ("mem_v", self.mem.as_ref().map(|(_, v)| v)),
            ("sink", self.sink.as_ref()),
            ("infini_q", infini.and_then(|i| i.q.as_ref())),
            ("infini_k", infini.and_then(|i| i.k.as_ref())),
            ("beta", infini.map(|i| &i.beta)),
            ("m0", infini.and_then(|i| i.m0.as_ref())),
            ("z0", infini.and_then(|i| i.z0.as_ref())),
        ];
        let tensors = named.into_iter().filter_map(|(name, t)| t.map(|t| (name.to_string(), Stored::of(t))));
        let integers = [("start", &self.start), ("lengths", &self.lengths)];
        tensors.chain(integers.map(|(name, values)| (name.to_string(), Stored::integers(values)))).collect()
    }
}

/// Results of an implementation, by output name; read from a file in any of the dtypes.
///
/// # Errors
/// [`Error::Malformed`] or [`Error::Invalid`], naming field, value and rule.
pub fn read_outputs(bytes: &[u8], case: &CaseFile) -> Result<BTreeMap<String, Tensor>> {
    let Header { entries, .. } = Header::read(bytes)?;
    let file = SafeTensors::deserialize(bytes).map_err(|e| Error::malformed(FILE, e.to_string()))?;
    let known: Vec<_> = OUTPUTS.into_iter().filter(|name| case.has_output(name)).collect();
    if let Some(name) = entries.keys().find(|name| !known.contains(&name.as_str()) && !name.starts_with("x_")) {
        return Err(Error::invalid("tensor", name, format!("an output of this case: {}", known.join(", "))));
    }
    let mut tensors = Tensors { file, entries };
    let mut outputs = BTreeMap::new();
    for name in OUTPUTS {
        let Some(entry) = tensors.entries.get(name) else { continue };
        let dtype = Dtype::ALL.into_iter().find(|&d| file_dtype(d).0 == entry.dtype);
        let dtype = dtype.ok_or_else(|| Error::invalid(name, &entry.dtype, "dtype F32, F16 or BF16"))?;
        if let Some(tensor) = tensors.take(name, dtype, &case.output_shape(name), 0)? {
            outputs.insert(name.to_string(), tensor);
        }
    }
    if outputs.is_empty() {
        return Err(Error::invalid("tensor", "none", format!("at least one output: {}", known.join(", "))));
    }
    Ok(outputs)
}

/// Writes outputs as a file that [`read_outputs`] reads.
///
/// # Errors
/// [`Error::Malformed`] where the tensors cannot be written.
pub fn write_outputs(outputs: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    serialize(None, outputs.iter().map(|(name, t)| (name.clone(), Stored::of(t))))
}

/// The bytes of a file.
///
/// # Errors
/// [`Error::Malformed`], naming the path.
pub fn read_file(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::malformed("file", format!("{}: {e}", path.display())))
}

const EXPECTED: [&str; 6] = ["expected_o", "expected_lse", "expected_mem_o", "expected_mem_lse", "expected_m", "expected_z"];

fn is_known(name: &str, infini: bool) -> bool {
    let attend = ["q", "k", "v", "mem_q", "mem_k", "mem_v", "sink", "lengths", "start"];
    let state = ["infini_q", "infini_k", "beta", "m0", "z0"];
    let results = if infini { &EXPECTED[..] } else { &EXPECTED[..4] };
    name.starts_with("x_") || attend.contains(&name) || results.contains(&name) || (infini && state.contains(&name))
}

fn case_blocks(start: &[u64], tokens: usize, block_len: usize) -> usize {
    let into = start.iter().map(|s| (s % block_len as u64) as usize).max().unwrap_or(0);
    if tokens == 0 { 0 } else { (into + tokens).div_ceil(block_len) }
}

fn output_shape(shape: &Shape, batch: usize, tokens: usize, blocks: usize, name: &str) -> Vec<usize> {
    let (heads, kv_heads, d) = (shape.heads(), shape.kv_heads(), shape.head_dim());
    match name {
        "o" => vec![batch, tokens, heads, d],
        "lse" => vec![batch, tokens, heads],
        "mem_o" => vec![batch, blocks, shape.mem_len(), heads, d],
        "mem_lse" => vec![batch, blocks, shape.mem_len(), heads],
        "m" => vec![batch, kv_heads, d, d],
        _ => vec![batch, kv_heads, d],
    }
}
