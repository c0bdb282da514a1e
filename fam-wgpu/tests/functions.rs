//! The functions that all shaders share, on a device, against f64.

use wgpu::util::DeviceExt;

/// `f` of each x.
fn on_device(f: &str, x: &[f32]) -> Vec<f32> {
    let adapters = pollster::block_on(fam_wgpu::adapters());
    let adapter = adapters.first().expect("an adapter: on Debian, apt-get install mesa-vulkan-drivers");
    let wgpu = pollster::block_on(adapter.open(None)).expect("a device");
    let device = wgpu.device();
    let text = format!(
        "const call = array<u32, 1>();\nconst MAX_GROUPS = 1u;\n{}{}
         @group(0) @binding(0) var<storage, read_write> x: array<f32>;
         @compute @workgroup_size(64)
         fn main(@builtin(global_invocation_id) id: vec3<u32>) {{ if (id.x < arrayLength(&x)) {{ x[id.x] = {f}; }} }}",
        include_str!("../src/common.wgsl"),
        include_str!("../src/f16_bits.wgsl")
    );
    let module =
        device.create_shader_module(wgpu::ShaderModuleDescriptor { label: None, source: wgpu::ShaderSource::Wgsl(text.into()) });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    });
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let buffer =
        device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents: bytemuck::cast_slice(x), usage });
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[wgpu::BindGroupEntry { binding: 0, resource: buffer.as_entire_binding() }],
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    pass.set_pipeline(&pipeline);
    pass.set_bind_group(0, &group, &[]);
    pass.dispatch_workgroups(x.len().div_ceil(64) as u32, 1, 1);
    drop(pass);
    wgpu.queue().submit([encoder.finish()]);
    let mut out = vec![0f32; x.len()];
    let region = fam_wgpu::Region::whole(&buffer).expect("a storage buffer");
    fam_core::Device::download(&wgpu, &region, 0, bytemuck::cast_slice_mut(&mut out)).expect("a result");
    out
}

/// The largest error of `f` in units of 2^-24 of the result, and where.
fn worst(f: &str, x: &[f32], exact: fn(f64) -> f64) -> (f64, f32) {
    let results = on_device(f, x);
    let errors = x.iter().zip(results).map(|(&x, y)| {
        let exact = exact(x.into());
        ((f64::from(y) - exact).abs() / exact.abs().max(f64::from(f32::MIN_POSITIVE)) * f64::from(1 << 24), x)
    });
    errors.max_by(|a, b| a.0.total_cmp(&b.0)).expect("some numbers")
}

#[test]
fn exponentials_and_logarithms_are_within_two_ulp() {
    let negative: Vec<f32> = (0..200_000).map(|i| -(i as f32) * 0.000_437).collect();
    for (f, exact) in [("exp_negative(x[id.x])", f64::exp as fn(f64) -> f64), ("exp2_negative(x[id.x])", f64::exp2)] {
        let (error, x) = worst(f, &negative, exact);
        println!("{f}: {error} at {x}");
        assert!(error <= 4.0, "{f} is wrong by {error} of 2^-24 at {x}");
    }
    let positive: Vec<f32> = (0..200_000).map(|i| 1.0 + i as f32 * i as f32 * 0.001).collect();
    let (error, x) = worst("ln(x[id.x])", &positive[1..], f64::ln);
    assert!(error <= 4.0, "ln is wrong by {error} of 2^-24 at {x}");
}
