//! How kernels read rows of queries, keys and values: word by word wherever they lie, and where rows begin at multiples of four elements the four
//! channels of a vector at once.

use crate::call::{Call, T};
use crate::pipeline::{Gpu, Kernel, Shader};
use fam_core::{Dtype, Result, Shape};

/// What is read so.
const INPUTS: [T; 6] = [T::Q, T::MemQ, T::K, T::V, T::MemK, T::MemV];

/// Kernels that are the same but for how they read. Their bits are, too.
#[derive(Clone, Debug)]
pub(crate) struct OfRows {
    each: Kernel,
    /// Where rows are whole fours.
    fours: Option<Kernel>,
}

impl OfRows {
    pub fn new(gpu: &Gpu, shape: &Shape, shader: Shader, constants: &str) -> Result<Self> {
        let fours = || gpu.kernel(shader, &format!("{constants}{}", fours(shape.dtype())));
        Ok(OfRows {
            each: gpu.kernel(shader, &format!("{constants}{}", each()))?,
            fours: shape.head_dim().is_multiple_of(4).then(fours).transpose()?,
        })
    }

    /// The kernel for where the tensors of a call lie.
    pub fn of(&self, call: &Call<'_>) -> &Kernel {
        self.fours
            .as_ref()
            .filter(|kernel| call.lie_in_fours(kernel.tensors().filter(|t| INPUTS.contains(t))))
            .unwrap_or(&self.each)
    }
}

/// Rows that lie anywhere.
pub(crate) fn each() -> &'static str {
    concat!(include_str!("load_each.wgsl"), include_str!("load.wgsl"))
}

/// Rows at multiples of four elements.
fn fours(dtype: Dtype) -> String {
    let (word, padded) = match dtype {
        Dtype::F32 => ("vec4<u32>", "word"),
        _ => ("vec2<u32>", "vec4(word, 0u, 0u)"),
    };
    let of_dtype = format!("alias Word = {word};\n\nfn padded(word: Word) -> vec4<u32> {{\n    return {padded};\n}}\n\n");
    [&of_dtype, include_str!("load_fours.wgsl"), include_str!("load.wgsl")].concat()
}
