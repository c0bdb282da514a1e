//! Safetensors files read with suspicion: every size is checked against the file before anything is allocated for it, and no name may come
//! twice (a JSON map would keep the last one silently).

use fam_core::{Dtype, Error, MAX_ELEMENTS, Result, bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::de::{Deserializer as _, MapAccess, Visitor};
use std::collections::{BTreeMap, HashMap};
use std::fmt;

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

/// A tensor's entry in the header.
#[derive(Clone, Debug, serde::Deserialize)]
pub(crate) struct Entry {
    pub dtype: String,
    pub shape: Vec<u64>,
    pub data_offsets: [u64; 2],
}

/// The header, every name once.
pub(crate) struct Header {
    pub metadata: HashMap<String, String>,
    pub entries: BTreeMap<String, Entry>,
}

pub(crate) const FILE: &str = "safetensors file";

impl Header {
    /// Reads and checks the header of a file against the file's own size. Allocates no more than the header has bytes.
    pub fn read(bytes: &[u8]) -> Result<Self> {
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
pub(crate) struct Tensors<'a> {
    pub file: SafeTensors<'a>,
    pub entries: BTreeMap<String, Entry>,
}

impl Tensors<'_> {
    /// The tensor `name` with exactly the sizes `shape` and a dtype of `dtype`; a size in `or_one` may also be 1.
    pub fn take(&mut self, name: &'static str, dtype: Dtype, shape: &[usize], or_one: usize) -> Result<Option<Tensor>> {
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

    pub fn require(&mut self, name: &'static str, dtype: Dtype, shape: &[usize]) -> Result<Tensor> {
        self.take(name, dtype, shape, 0)?.ok_or_else(|| Error::invalid(name, "absent", "a case of this op has this tensor"))
    }

    /// Non-negative integers, one for each stream.
    pub fn integers(&mut self, name: &'static str, batch: usize) -> Result<Option<Vec<u64>>> {
        let Some(entry) = self.entries.remove(name) else { return Ok(None) };
        if entry.dtype != "I64" || entry.shape != [batch as u64] {
            return Err(Error::invalid(name, format!("{} {:?}", entry.dtype, entry.shape), format!("I64 [{batch}]")));
        }
        let view = self.file.tensor(name).map_err(|e| Error::malformed(FILE, e.to_string()))?;
        let values = view.data().as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes));
        let checked = values.map(|v| u64::try_from(v).map_err(|_| Error::invalid(name, v, "not negative")));
        checked.collect::<Result<_>>().map(Some)
    }

    pub fn sizes<const R: usize>(&self, name: &'static str) -> Result<[usize; R]> {
        let entry = self.entries.get(name).ok_or_else(|| Error::invalid(name, "absent", "every case has this tensor"))?;
        let sizes: Vec<usize> = entry.shape.iter().map(|&s| s as usize).collect();
        sizes.try_into().map_err(|_| Error::invalid(name, format!("shape {:?}", entry.shape), format!("{R} axes")))
    }
}

pub(crate) fn file_dtype(dtype: Dtype) -> (&'static str, safetensors::Dtype) {
    match dtype {
        Dtype::F16 => ("F16", safetensors::Dtype::F16),
        Dtype::Bf16 => ("BF16", safetensors::Dtype::BF16),
        _ => ("F32", safetensors::Dtype::F32),
    }
}

/// A tensor as it goes into a file.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Stored {
    pub fn of(t: &Tensor) -> Self {
        Stored { dtype: file_dtype(t.dtype).1, shape: t.shape.clone(), data: t.data.clone() }
    }

    pub fn integers(values: &[u64]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Stored { dtype: safetensors::Dtype::I64, shape: vec![values.len()], data }
    }

    pub fn wide(shape: &[usize], values: &[f64]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Stored { dtype: safetensors::Dtype::F64, shape: shape.to_vec(), data }
    }
}

/// A file of `tensors`.
pub(crate) fn serialize(
    metadata: Option<HashMap<String, String>>,
    tensors: impl IntoIterator<Item = (String, Stored)>,
) -> Result<Vec<u8>> {
    let tensors: Vec<_> = tensors.into_iter().collect();
    let malformed = |e: safetensors::SafeTensorError| Error::malformed(FILE, e.to_string());
    let views = tensors.iter().map(|(name, t)| Ok((name, TensorView::new(t.dtype, t.shape.clone(), &t.data)?)));
    safetensors::serialize(views.collect::<Result<Vec<_>, _>>().map_err(malformed)?, metadata).map_err(malformed)
}
