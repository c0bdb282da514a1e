//! `attend` on the first adapter of this machine beside a plain product of matrices in WGSL, and beside itself without the device's optional
//! features, turn by turn in one run: GFLOP/s, and ratios. A call is one submission and the wait for it; a product and an addition are two FLOP,
//! and only visible pairs of row and key count.

use benches::{LAYERS, Layer, values};
use fam::wgpu::{Region, Wgpu, adapters, wgpu};
use fam::{Attend, Backend, Device, Dtype, Keys, Layout, Op, Plan, Result, Rows, Span, Spans, View, ViewMut};
use std::time::Instant;

/// Rows and columns of the matrices.
const N: usize = 512;

fn main() -> Result<()> {
    // As criterion's: cargo bench -- --test runs everything once.
    let rounds = if std::env::args().any(|arg| arg == "--test") { 1 } else { 31 };
    let Some(adapter) = pollster::block_on(adapters()).into_iter().next() else {
        println!("no adapter");
        return Ok(());
    };
    let wgpu = pollster::block_on(adapter.open(None))?;
    // All limits, but no features.
    let plain = pollster::block_on(adapter.open(Some(adapter.limits())))?;
    let [step, decode] = [(&LAYERS[0], LAYERS[0].block_len), (&LAYERS[1], 1)];
    let mut product = Product::new(&wgpu)?;
    let mut calls = [(&wgpu, step), (&plain, step), (&wgpu, decode), (&plain, decode)]
        .into_iter()
        .map(|(wgpu, (layer, tokens))| Step::new(wgpu, layer, tokens))
        .collect::<Result<Vec<_>>>()?;
    // The first calls take shaders in.
    product.run()?;
    calls.iter_mut().try_for_each(Step::run)?;
    let mut seconds = [const { Vec::new() }; 5];
    for _ in 0..rounds {
        seconds[4].push(timed(|| product.run())?);
        for (call, seconds) in calls.iter_mut().zip(&mut seconds) {
            seconds.push(timed(|| call.run())?);
        }
    }
    product.check()?;
    let [step, plain_step, decode, plain_decode, matmul] = &seconds;
    println!("{}: matmul {:.2} GFLOP/s", adapter.info().name, product.flop() / median(matmul) / 1e9);
    for (name, call, seconds, plain_seconds) in
        [("step", &calls[0], step, plain_step), ("decode", &calls[2], decode, plain_decode)]
    {
        println!("{name}, {}: {:.2} GFLOP/s", wgpu.variant().0, call.flop() / median(seconds) / 1e9);
        ratio(&format!("{name} / matmul, GFLOP/s"), matmul, seconds, call.flop() / product.flop());
        ratio(&format!("{name}, {} / {}, GFLOP/s", wgpu.variant().0, plain.variant().0), plain_seconds, seconds, 1.0);
    }
    Ok(())
}

/// `factor` times the ratio of what was measured in the same round.
fn ratio(what: &str, dividends: &[f64], divisors: &[f64], factor: f64) {
    let mut ratios: Vec<f64> = dividends.iter().zip(divisors).map(|(a, b)| factor * a / b).collect();
    let median = median(&ratios);
    ratios.sort_by(f64::total_cmp);
    println!("{what}: {median:.2} (from {:.2} to {:.2} over {} rounds)", ratios[0], ratios[ratios.len() - 1], ratios.len());
}

fn timed(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn upload(wgpu: &Wgpu, values: &[f32]) -> Result<Region> {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut region = wgpu.alloc(bytes.len() as u64)?;
    wgpu.upload(&mut region, 0, &bytes)?;
    Ok(region)
}

fn encoder(wgpu: &Wgpu) -> wgpu::CommandEncoder {
    wgpu.device().create_command_encoder(&Default::default())
}

/// C = A B.
struct Product<'w> {
    wgpu: &'w Wgpu,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Region,
    pipeline: wgpu::ComputePipeline,
    tensors: wgpu::BindGroup,
}

impl<'w> Product<'w> {
    fn new(wgpu: &'w Wgpu) -> Result<Self> {
        let device = wgpu.device();
        let [a, b] = ["a", "b"].map(|name| values::<f32>(name, N * N));
        let (on_a, on_b, c) = (upload(wgpu, &a)?, upload(wgpu, &b)?, wgpu.alloc(4 * (N * N) as u64)?);
        let module = device.create_shader_module(wgpu::include_wgsl!("matmul.wgsl"));
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        let buffers = (0..).zip([&on_a, &on_b, &c]);
        let entries: Vec<_> = buffers
            .map(|(binding, region)| wgpu::BindGroupEntry { binding, resource: region.buffer().as_entire_binding() })
            .collect();
        let layout = &pipeline.get_bind_group_layout(0);
        let tensors = device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
        Ok(Product { wgpu, a, b, c, pipeline, tensors })
    }

    fn flop(&self) -> f64 {
        2.0 * (N * N * N) as f64
    }

    fn run(&mut self) -> Result<()> {
        let mut encoder = encoder(self.wgpu);
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.tensors, &[]);
        pass.dispatch_workgroups((N / 64) as u32, (N / 64) as u32, 1);
        drop(pass);
        self.wgpu.synchronize(&mut encoder)
    }

    /// Some elements against f64: what is timed is a product.
    fn check(&self) -> Result<()> {
        let mut c = vec![0; 4 * N * N];
        self.wgpu.download(&self.c, 0, &mut c)?;
        for at in (0..N * N).step_by(1001) {
            let products = (0..N).map(|k| f64::from(self.a[at / N * N + k]) * f64::from(self.b[k * N + at % N]));
            let (exact, magnitude) = products.fold((0.0, 0.0), |(sum, magnitude), x| (sum + x, magnitude + x.abs()));
            let value = f32::from_le_bytes([c[4 * at], c[4 * at + 1], c[4 * at + 2], c[4 * at + 3]]);
            assert!((f64::from(value) - exact).abs() <= N as f64 / f64::from(1 << 24) * magnitude, "{value} for {exact}");
        }
        Ok(())
    }
}

/// The last rows of a block that sees its window, all heads.
struct Step<'w> {
    wgpu: &'w Wgpu,
    plan: <Wgpu as Backend>::Plan,
    layer: &'w Layer,
    tokens: usize,
    q: Region,
    k: Region,
    v: Region,
    o: Region,
    scratch: Region,
}

impl<'w> Step<'w> {
    fn new(wgpu: &'w Wgpu, layer: &'w Layer, tokens: usize) -> Result<Self> {
        let spec = layer.shape(Dtype::F32).build()?.spec(1, tokens).ops(&[Op::Attend]).build()?;
        let plan = wgpu.plan(&spec)?;
        let [q, kv] = [tokens * layer.heads, keys(layer) * layer.kv_heads].map(|rows| rows * layer.head_dim);
        let [q, k, v] = [("q", q), ("k", kv), ("v", kv)].map(|(name, len)| upload(wgpu, &values::<f32>(name, len)));
        let (q, k, v, scratch) = (q?, k?, v?, wgpu.alloc(plan.support().scratch_bytes)?);
        let o = wgpu.alloc(q.range().end)?;
        Ok(Step { wgpu, plan, layer, tokens, q, k, v, o, scratch })
    }

    fn flop(&self) -> f64 {
        let most = keys(self.layer);
        let pairs: usize = (most - self.tokens + 1..=most).sum();
        (4 * self.layer.head_dim * self.layer.heads * pairs) as f64
    }

    fn run(&mut self) -> Result<()> {
        let (Layer { heads, kv_heads, head_dim, .. }, most) = (*self.layer, keys(self.layer));
        let [q, kv] =
            [[1, self.tokens, heads, head_dim], [1, most, kv_heads, head_dim]].map(|sizes| Layout::tokens(Dtype::F32, sizes));
        let span = [Span::new(0, (most - self.tokens) as u64, self.tokens as u32)];
        let keys = Keys::Strided { k: View::new(&self.k, kv), v: View::new(&self.v, kv) };
        let rows = Rows::new(View::new(&self.q, q), ViewMut::new(&mut self.o, q));
        let mut encoder = encoder(self.wgpu);
        self.wgpu.attend(&self.plan, &mut encoder, Attend::new(Spans::Host(&span), keys).rows(rows), &mut self.scratch)?;
        self.wgpu.synchronize(&mut encoder)
    }
}

/// Keys that the last row of the block sees.
fn keys(layer: &Layer) -> usize {
    (layer.window_blocks + 1) * layer.block_len
}
