//! Case files: one safetensors file holds a problem and, optionally, its expected results, so that anyone can check any implementation in
//! any language, and any engine's dumps can be replayed.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `q` | `[N, L, Hq, D]` | f32, f16 or bf16: one dtype for all of q, k, v, `mem_*`, `infini_*` |
//! | `k`, `v` | `[N, L, Hkv, D]` | |
//! | `mem_q` | `[N, nb, F, Hq, D]` | optional; nb = blocks that L tokens touch from the earliest start in a block; N or nb may be 1: shared |
//! | `mem_k`, `mem_v` | `[N, nb, F, Hkv, D]` | optional; each block's given memory |
//! | `sink` | `[Hq]` f32 | optional |
//! | `lengths`, `start` | `[N]` i64 | optional; default L and 0. Rows past a length are neither read nor compared |
//! | `infini_q`, `infini_k` | as q, k | op infini, optional: without rotary positions; default q, k |
//! | `beta` | `[Hq]` f32 | op infini: the gate is sigmoid(beta) |
//! | `m0`, `z0` | `[N, Hkv, D, D]`, `[N, Hkv, D]` f32 | op infini, optional; default 0 |
//! | `expected_o`, `expected_lse`, `expected_mem_o`, `expected_mem_lse`, `expected_m`, `expected_z` | as the outputs | optional, f32 |
//!
//! Metadata, all strings: `format` = "1", `op` = "attend" or "infini", `block_len`, exactly one of `window_blocks` and `window_tokens`,
//! `scale` (default 1/√D), `rule` = "linear" or "delta" (op infini), `source` (free text). Other metadata is ignored; another tensor is an
//! error, unless its name starts with `x_`.

use fam_core::{Dtype, Error, InfiniRule, MAX_ELEMENTS, Result, Shape, Window, bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::de::{Deserializer as _, MapAccess, Visitor};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

/// Names of the results, in the order of reports.
pub const OUTPUTS: [&str; 6] = ["o", "lse", "mem_o", "mem_lse", "m", "z"];

/// The most elements of m that a file may ask for: 1 GiB.
const MAX_STATE: u64 = 1 << 28;

/// A packed, row-major tensor of a case or output file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Element type.
    pub dtype: Dtype,
    /// Sizes.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub data: Vec<u8>,
}

impl Tensor {
    /// Rounds `values` to `dtype`.
    pub fn from_values(dtype: Dtype, shape: Vec<usize>, values: impl IntoIterator<Item = f64>) -> Self {
        let values = values.into_iter().map(|v| v as f32);
        let data = match dtype {
            Dtype::F16 => values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
            Dtype::Bf16 => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
            _ => values.flat_map(f32::to_le_bytes).collect(),
        };
        Tensor { dtype, shape, data }
    }

    /// The elements, exactly.
    pub fn values(&self) -> Vec<f64> {
        fn each<const W: usize>(data: &[u8], value: impl Fn([u8; W]) -> f32) -> Vec<f64> {
            data.as_chunks::<W>().0.iter().map(|&bytes| f64::from(value(bytes))).collect()
        }
        match self.dtype {
            Dtype::F16 => each(&self.data, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::Bf16 => each(&self.data, |b| bf16::from_le_bytes(b).to_f32()),
            _ => each(&self.data, f32::from_le_bytes),
        }
    }
}

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

/// A tensor's entry in the header.
#[derive(Clone, Debug, serde::Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header, every name once.
struct Header {
    metadata: HashMap<String, String>,
    entries: BTreeMap<String, Entry>,
}

const FILE: &str = "safetensors file";

impl Header {
    /// Reads and checks the header of a file against the file's own size. Allocates no more than the header has bytes.
    fn read(bytes: &[u8]) -> Result<Self> {
        let wrong = |reason: String| Error::malformed(FILE, reason);
        let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(wrong(format!("{} bytes; a file starts with an 8-byte header length", bytes.len())));
        };
        let length = u64::from_le_bytes(*length);
        let Some(json) = usize::try_from(length).ok().and_then(|n| rest.get(..n)) else {
            return Err(wrong(format!("header length = {length}: at most the {} bytes that follow", rest.len())));
        };
        let available = (rest.len() - json.len()) as u64;
        let mut parser = serde_json::Deserializer::from_slice(json);
        let header = parser.deserialize_map(HeaderVisitor).map_err(|e| wrong(format!("header: {e}")))?;
        // Sizes before places: one tensor that claims too much moves all behind it.
        let mut sizes = Vec::with_capacity(header.entries.len());
        for (name, Entry { dtype, shape, .. }) in &header.entries {
            let Some(width) = width(dtype) else {
                return Err(wrong(format!("{name}: dtype = {dtype}: one of F32, F16, BF16, I64")));
            };
            let elements = shape.iter().try_fold(1u64, |n, &s| n.checked_mul(s)).filter(|&n| n <= MAX_ELEMENTS);
            match elements {
                Some(elements) if shape.iter().all(|&s| s <= MAX_ELEMENTS) => sizes.push(elements * width),
                _ => {
                    return Err(wrong(format!(
                        "{name}: shape = {shape:?}: at most {MAX_ELEMENTS} elements, on each axis and in all"
                    )));
                }
            }
        }
        for ((name, entry), bytes) in header.entries.iter().zip(sizes) {
            let [start, end] = entry.data_offsets;
            if start > end || end > available || end - start != bytes {
                let rule = format!("{bytes} bytes of {} inside the file's {available}", entry.dtype);
                return Err(wrong(format!("{name}: data_offsets = [{start}, {end}]: {rule}")));
            }
        }
        Ok(header)
    }
}

fn width(dtype: &str) -> Option<u64> {
    match dtype {
        "F32" => Some(4),
        "F16" | "BF16" => Some(2),
        "I64" => Some(8),
        _ => None,
    }
}

/// Collects the header's names and refuses a second one: a JSON map would silently keep the last.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header { metadata: HashMap::new(), entries: BTreeMap::new() };
        let mut seen_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            let twice = if name == "__metadata__" {
                header.metadata = map.next_value::<Metadata>()?.0;
                std::mem::replace(&mut seen_metadata, true)
            } else {
                header.entries.insert(name.clone(), map.next_value()?).is_some()
            };
            if twice {
                return Err(serde::de::Error::custom(format!("{name}: there twice")));
            }
        }
        Ok(header)
    }
}

/// The metadata, every key once too.
struct Metadata(HashMap<String, String>);

impl<'de> serde::Deserialize<'de> for Metadata {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MetadataVisitor;
        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut metadata = HashMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if metadata.contains_key(&key) {
                        return Err(serde::de::Error::custom(format!("{key}: there twice")));
                    }
                    metadata.insert(key, value);
                }
                Ok(Metadata(metadata))
            }
        }
        deserializer.deserialize_map(MetadataVisitor)
    }
}

/// Takes the tensors of a file one by one; what is left at the end is unknown.
struct Tensors<'a> {
    file: SafeTensors<'a>,
    entries: BTreeMap<String, Entry>,
}

impl Tensors<'_> {
    /// The tensor `name` with exactly the sizes `shape` and a dtype of `dtype`; a size in `or_one` may also be 1.
    fn take(&mut self, name: &'static str, dtype: Dtype, shape: &[usize], or_one: usize) -> Result<Option<Tensor>> {
        let Some(entry) = self.entries.remove(name) else { return Ok(None) };
        if entry.dtype != file_dtype(dtype).0 {
            return Err(Error::invalid(name, entry.dtype, format!("dtype {}", file_dtype(dtype).0)));
        }
        let fits = entry.shape.len() == shape.len()
            && entry
                .shape
                .iter()
                .zip(shape)
                .enumerate()
                .all(|(axis, (&have, &want))| have == want as u64 || (axis < or_one && have == 1));
        if !fits {
            let shared = if or_one > 0 { format!(", or 1 in the first {or_one}") } else { String::new() };
            return Err(Error::invalid(name, format!("shape {:?}", entry.shape), format!("shape {shape:?}{shared}")));
        }
        let data = self.file.tensor(name).map_err(|e| Error::malformed(FILE, e.to_string()))?.data().to_vec();
        Ok(Some(Tensor { dtype, shape: entry.shape.iter().map(|&s| s as usize).collect(), data }))
    }

    fn require(&mut self, name: &'static str, dtype: Dtype, shape: &[usize]) -> Result<Tensor> {
        self.take(name, dtype, shape, 0)?.ok_or_else(|| Error::invalid(name, "absent", "a case of this op has this tensor"))
    }

    /// Non-negative integers, one for each stream.
    fn integers(&mut self, name: &'static str, batch: usize) -> Result<Option<Vec<u64>>> {
        let Some(entry) = self.entries.remove(name) else { return Ok(None) };
        if entry.dtype != "I64" || entry.shape != [batch as u64] {
            return Err(Error::invalid(name, format!("{} {:?}", entry.dtype, entry.shape), format!("I64 [{batch}]")));
        }
        let view = self.file.tensor(name).map_err(|e| Error::malformed(FILE, e.to_string()))?;
        let values = view.data().as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes));
        let checked = values.map(|v| u64::try_from(v).map_err(|_| Error::invalid(name, v, "not negative")));
        checked.collect::<Result<_>>().map(Some)
    }

    fn sizes<const R: usize>(&self, name: &'static str) -> Result<[usize; R]> {
        let entry = self.entries.get(name).ok_or_else(|| Error::invalid(name, "absent", "every case has this tensor"))?;
        let sizes: Vec<usize> = entry.shape.iter().map(|&s| s as usize).collect();
        sizes.try_into().map_err(|_| Error::invalid(name, format!("shape {:?}", entry.shape), format!("{R} axes")))
    }
}

fn file_dtype(dtype: Dtype) -> (&'static str, safetensors::Dtype) {
    match dtype {
        Dtype::F16 => ("F16", safetensors::Dtype::F16),
        Dtype::Bf16 => ("BF16", safetensors::Dtype::BF16),
        _ => ("F32", safetensors::Dtype::F32),
    }
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
        if let Some(&late) = start.iter().find(|&&s| s > u64::MAX / 4) {
            return Err(Error::LimitExceeded { what: "start", requested: late, max: u64::MAX / 4 });
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

    /// The sizes of an output.
    pub fn output_shape(&self, name: &str) -> Vec<usize> {
        output_shape(&self.shape, self.batch, self.tokens, self.blocks(), name)
    }

    /// The file as bytes.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the tensors cannot be written.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
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

        let mut tensors: Vec<(String, &Tensor)> = vec![("q".into(), &self.q), ("k".into(), &self.k), ("v".into(), &self.v)];
        let infini = self.infini.as_ref();
        for (name, tensor) in [
            ("mem_q", self.mem_q.as_ref()),
            ("mem_k", self.mem.as_ref().map(|(k, _)| k)),
            ("mem_v", self.mem.as_ref().map(|(_, v)| v)),
            ("sink", self.sink.as_ref()),
            ("infini_q", infini.and_then(|i| i.q.as_ref())),
            ("infini_k", infini.and_then(|i| i.k.as_ref())),
            ("beta", infini.map(|i| &i.beta)),
            ("m0", infini.and_then(|i| i.m0.as_ref())),
            ("z0", infini.and_then(|i| i.z0.as_ref())),
        ] {
            tensors.extend(tensor.map(|t| (name.to_string(), t)));
        }
        tensors.extend(self.expected.iter().map(|(name, t)| (format!("expected_{name}"), t)));
        let integers = |values: &[u64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let (start, lengths) = (integers(&self.start), integers(&self.lengths));
        let mut views = Vec::new();
        let malformed = |e: safetensors::SafeTensorError| Error::malformed(FILE, e.to_string());
        for (name, t) in tensors {
            views.push((name, TensorView::new(file_dtype(t.dtype).1, t.shape.clone(), &t.data).map_err(malformed)?));
        }
        for (name, data) in [("start", &start), ("lengths", &lengths)] {
            views.push((name.into(), TensorView::new(safetensors::Dtype::I64, vec![self.batch], data).map_err(malformed)?));
        }
        safetensors::serialize(views, Some(metadata)).map_err(malformed)
    }
}

/// Results of an implementation, by output name; read from a file in any of the dtypes.
///
/// # Errors
/// [`Error::Malformed`] or [`Error::Invalid`], naming field, value and rule.
pub fn read_outputs(bytes: &[u8], case: &CaseFile) -> Result<BTreeMap<String, Tensor>> {
    let Header { entries, .. } = Header::read(bytes)?;
    let file = SafeTensors::deserialize(bytes).map_err(|e| Error::malformed(FILE, e.to_string()))?;
    if let Some(name) = entries.keys().find(|name| !OUTPUTS.contains(&name.as_str()) && !name.starts_with("x_")) {
        return Err(Error::invalid("tensor", name, format!("an output: {}", OUTPUTS.join(", "))));
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
        return Err(Error::invalid("tensor", "none", format!("at least one output: {}", OUTPUTS.join(", "))));
    }
    Ok(outputs)
}

/// Writes outputs as a file that [`read_outputs`] reads.
///
/// # Errors
/// [`Error::Malformed`] where the tensors cannot be written.
pub fn write_outputs(outputs: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    let malformed = |e: safetensors::SafeTensorError| Error::malformed(FILE, e.to_string());
    let views = outputs.iter().map(|(name, t)| {
        TensorView::new(file_dtype(t.dtype).1, t.shape.clone(), &t.data).map(|view| (name.clone(), view)).map_err(malformed)
    });
    safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None).map_err(malformed)
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
