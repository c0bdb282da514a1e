//! Every text that can be selected, on devices of every size, is valid WGSL for the least that WebGPU guarantees, and becomes SPIR-V. The devices
//! here do nothing, so no driver is needed.
//!
//! ```sh
//! SHADERS=folder cargo test -p fam-wgpu --test shaders    # writes the texts too, for another compiler: scripts/test-dawn
//! ```

mod common;

use fam_core::{Backend, Dtype, InfiniRule, Op, Shape, Spec, Window};
use fam_wgpu::{FEATURES, Wgpu};
use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use std::collections::BTreeSet;
use std::sync::LazyLock;

/// Head dims: those that models have, and the edges of the shaders' vectors of four channels and chunks of 64.
const HEAD_DIMS: [usize; 12] = [1, 4, 7, 32, 63, 64, 80, 96, 128, 129, 192, 256];

/// A device that compiles nothing and runs nothing.
fn idle(required_features: wgpu::Features, required_limits: wgpu::Limits) -> Wgpu {
    let noop = wgpu::NoopBackendOptions { enable: true, ..Default::default() };
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::NOOP,
        backend_options: wgpu::BackendOptions { noop, ..Default::default() },
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::NOOP));
    let descriptor = wgpu::DeviceDescriptor { required_features, required_limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapters[0].request_device(&descriptor)).expect("a device that does nothing");
    Wgpu::new(&device, &queue).expect("a backend")
}

/// Devices with little and much of what kernels are chosen by; the least first.
fn devices() -> Vec<wgpu::Limits> {
    let least = common::least();
    let with = |buffers, storage: u32, threads| wgpu::Limits {
        max_storage_buffers_per_shader_stage: buffers,
        max_compute_workgroup_storage_size: storage << 10,
        max_compute_invocations_per_workgroup: threads,
        ..least.clone()
    };
    vec![with(8, 16, 256), with(32, 16, 256), with(32, 32, 1024), with(32, 48, 1024), with(32, 64, 1024)]
}

/// The texts of everything that plans of these devices ask for.
fn texts() -> &'static BTreeSet<String> {
    static TEXTS: LazyLock<BTreeSet<String>> = LazyLock::new(|| {
        let texts_of = |(features, limits)| {
            let wgpu = idle(features, limits);
            specs().for_each(|spec| drop(wgpu.plan(&spec).expect("a plan")));
            wgpu.shaders()
        };
        let features = [wgpu::Features::empty(), FEATURES];
        features.into_iter().flat_map(|f| devices().into_iter().map(move |limits| (f, limits))).flat_map(texts_of).collect()
    });
    &TEXTS
}

/// Head dims and dtypes, each with outputs of its own type and of f32, with a compressive memory and without: what is gated has other kernels.
fn specs() -> impl Iterator<Item = Spec> {
    HEAD_DIMS.into_iter().flat_map(|d| Dtype::ALL.map(|dtype| (d, dtype))).flat_map(|(d, dtype)| {
        let shape =
            Shape::builder().heads(4).kv_heads(2).head_dim(d).dtype(dtype).block_len(8).window(Window::Blocks(1)).mem_len(2);
        let all = (shape.clone().infini(InfiniRule::Delta), &Op::FORWARD[..]);
        let local = (shape, &[Op::Append, Op::Attend, Op::Merge][..]);
        let outputs = if dtype == Dtype::F32 { vec![dtype] } else { vec![dtype, Dtype::F32] };
        outputs.into_iter().flat_map(move |out| {
            [all.clone(), local.clone()]
                .map(|(shape, ops)| shape.build().and_then(|s| s.spec(2, 8).out_dtype(out).ops(ops).build()).expect("a spec"))
        })
    })
}

/// Whether a text is meant for devices whose shaders have subgroups.
fn has_subgroups(text: &str) -> bool {
    text.contains("subgroupShuffleXor")
}

/// Valid for a device without any feature but those that the text is meant for, and SPIR-V with the checks of a shader module and without.
fn compile(text: &str) -> Result<(), String> {
    let module = naga::front::wgsl::parse_str(text).map_err(|error| error.emit_to_string(text))?;
    let mut capabilities = Capabilities::empty();
    capabilities.set(Capabilities::SUBGROUP, has_subgroups(text));
    capabilities.set(Capabilities::SHADER_FLOAT16_IN_FLOAT32, text.contains("unpack2x16float"));
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE).subgroup_operations(naga::valid::SubgroupOperationSet::all());
    let info = validator.validate(&module).map_err(|error| error.emit_to_string(text))?;
    for policy in [BoundsCheckPolicy::Restrict, BoundsCheckPolicy::Unchecked] {
        let bounds_check_policies = BoundsCheckPolicies { index: policy, buffer: policy, ..Default::default() };
        let options = spv::Options {
            // As wgpu writes it for Vulkan 1.1 and later.
            lang_version: (1, 3),
            bounds_check_policies,
            force_loop_bounding: policy == BoundsCheckPolicy::Restrict,
            ..spv::Options::default()
        };
        let words = spv::write_vec(&module, &info, &options, None).map_err(|error| error.to_string())?;
        assert!(words.len() > 100, "SPIR-V of {} words", words.len());
    }
    Ok(())
}

#[test]
fn every_text_is_valid_and_becomes_spir_v() {
    let texts = texts();
    println!("{} texts", texts.len());
    // Eight kernels and more of twelve head dims and three dtypes.
    assert!(texts.len() > 8 * 12 * 3, "{} texts", texts.len());
    let with_subgroups = texts.iter().filter(|text| has_subgroups(text)).count();
    assert!(with_subgroups > 2 * 12 * 3, "{with_subgroups} with subgroups");
    for text in texts {
        compile(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    }
    if let Some(folder) = std::env::var_os("SHADERS").map(std::path::PathBuf::from) {
        std::fs::create_dir_all(&folder).expect("a folder");
        for (number, text) in texts.iter().enumerate() {
            // In a browser a shader names what it uses; naga refuses that.
            let enables = if has_subgroups(text) { "enable subgroups;\n" } else { "" };
            std::fs::write(folder.join(format!("{number:04}.wgsl")), format!("{enables}{text}")).expect("a file");
        }
    }
}

#[test]
fn what_is_not_valid_is_seen() {
    let text = texts().iter().next().expect("a text");
    assert!(compile(&text.replacen("@compute", "@compute @compute_twice", 1)).is_err());
    let needs_f16 = format!("{text}\nfn f() -> f16 {{ return f16(1.0); }}");
    assert!(compile(&format!("enable f16;\n{needs_f16}")).is_err(), "f16 is no part of the least device");
}
