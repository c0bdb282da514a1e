//! How kernels read rows of queries, keys and values: word by word wherever they lie, and where rows begin at multiples of four elements the four
//! channels of a vector at once.

use crate::call::{Call, T};
use crate::pipeline::{Gpu, Kernel, Shader};
use fam_core::{Dtype, Result, Shape};

/// What is read so.
const INPUTS: [T; 6] = [T::Q, T::MemQ, T::K, T::V, T::MemK, T::MemV];

/// Kernels that are the same but for how they read. Their bits are, too.
#[derive(Clone, Debug)]
pub(crate) struct LoadKernels {
    unaligned: Kernel,
    /// Where D is a multiple of four.
    aligned: Option<Kernel>,
}

impl LoadKernels {
    pub fn new(gpu: &Gpu, shape: &Shape, shader: Shader, constants: &str) -> Result<Self> {
        let aligned = || gpu.kernel(shader, &format!("{constants}{}", aligned(shape.dtype())));
        Ok(LoadKernels {
            unaligned: gpu.kernel(shader, &format!("{constants}{}", unaligned()))?,
            aligned: shape.head_dim().is_multiple_of(4).then(aligned).transpose()?,
        })
    }

    /// The kernel for where the tensors of a call lie.
    pub fn of(&self, call: &Call<'_>) -> &Kernel {
        self.aligned
            .as_ref()
            .filter(|kernel| call.are_aligned(kernel.tensors().filter(|t| INPUTS.contains(t))))
            .unwrap_or(&self.unaligned)
    }
}

/// Rows that lie anywhere.
pub(crate) fn unaligned() -> &'static str {
    concat!(include_str!("load_unaligned.wgsl"), include_str!("load.wgsl"))
}

/// Rows at multiples of four elements.
fn aligned(dtype: Dtype) -> String {
    let (load, padded) = match dtype {
        Dtype::F32 => ("vec4<u32>", "load"),
        _ => ("vec2<u32>", "vec4(load, 0u, 0u)"),
    };
    let of_dtype = format!("alias Load = {load};\n\nfn padded(load: Load) -> vec4<u32> {{\n    return {padded};\n}}\n\n");
    [&of_dtype, include_str!("load_aligned.wgsl"), include_str!("load.wgsl")].concat()
}
