//! `fam info`: what this machine offers to the contract's operations.

use crate::report::Report;
use crate::{Failure, Outcome};
use fam::cpu::Cpu;
use fam::{Backend, BackendName, Candidate, Dtype, InfiniRule, Op, Selected, Shape, Spec, Window};
use serde_json::json;

/// Backends, devices and kernels of this machine.
#[derive(clap::Args)]
pub struct Args {
    /// The op × dtype table as Markdown.
    #[arg(long)]
    markdown: bool,
}

/// One cell of the table: the kernel that serves an op in a dtype, or why none does.
struct Cell {
    backend: BackendName,
    op: Op,
    dtype: Dtype,
    kernel: Result<String, String>,
}

pub fn run(args: &Args, report: &Report) -> Result<Outcome, Failure> {
    let candidates = fam::candidates();
    let cells: Vec<Cell> = candidates.iter().flat_map(cells).collect();
    for cell in &cells {
        let kernel = cell.kernel.as_ref();
        report.record(
            "kernel",
            json!({ "backend": cell.backend.name(), "op": cell.op.name(), "dtype": cell.dtype.name(),
                    "kernel": kernel.ok(), "reason": kernel.err() }),
        )?;
    }
    if args.markdown {
        markdown(report)?;
        return Ok(Outcome::Right);
    }
    for candidate in &candidates {
        let state = match &candidate.backend {
            Ok(selected) => describe(selected),
            Err(error) => error.to_string(),
        };
        report.line(format!("{:5} {state}", candidate.name.name()))?;
        report.record(
            "backend",
            json!({ "backend": candidate.name.name(), "available": candidate.backend.is_ok(), "description": state }),
        )?;
        for op in Op::ALL {
            let row = cells.iter().filter(|c| c.backend == candidate.name && c.op == op);
            let kernels: Vec<_> = row.filter_map(|c| c.kernel.as_deref().ok()).collect();
            if !kernels.is_empty() {
                report.line(format!("      {:13} {}", op.name(), kernels.join("  ")))?;
            }
        }
    }
    Ok(Outcome::Right)
}

fn describe(selected: &Selected) -> String {
    match selected {
        Selected::Cpu(cpu) => {
            let (model, threads) = (crate::environment::cpu_model(), crate::environment::threads());
            format!("{model}, {threads} threads, instruction set {}", cpu.isa())
        }
        Selected::Wgpu(wgpu) => {
            let (info, (variant, reason)) = (wgpu.device().adapter_info(), wgpu.variant());
            let kind = if wgpu.is_software() { "software" } else { "GPU" };
            format!(
                "{} ({kind}; {:?}, {} {}), variant {variant}: {reason}",
                info.name, info.backend, info.driver, info.driver_info
            )
        }
        _ => String::new(),
    }
}

fn cells(candidate: &Candidate) -> Vec<Cell> {
    let mut out = Vec::new();
    for op in Op::ALL {
        for dtype in Dtype::ALL {
            let kernel = match &candidate.backend {
                Ok(Selected::Cpu(cpu)) => kernel(cpu, op, dtype),
                Ok(Selected::Wgpu(wgpu)) => kernel(wgpu, op, dtype),
                Ok(_) => Err("not part of this build".into()),
                Err(error) => Err(error.to_string()),
            };
            out.push(Cell { backend: candidate.name, op, dtype, kernel });
        }
    }
    out
}

/// The kernel for a shape that uses everything the contract has.
fn kernel(backend: &impl Backend, op: Op, dtype: Dtype) -> Result<String, String> {
    let support = whole_contract(op, dtype).and_then(|spec| backend.support(&spec)).map_err(|e| e.to_string())?;
    support.kernel(op).map(|k| k.to_string()).ok_or_else(|| "no kernel".into())
}

fn whole_contract(op: Op, dtype: Dtype) -> fam::Result<Spec> {
    let shape = Shape::builder().window(Window::Blocks(1)).mem_len(16).dtype(dtype).infini(InfiniRule::Linear).build()?;
    shape.spec(1, 128).ops(&[op]).build()
}

/// What this version serves, on any machine: on a GPU that has no more than WebGPU's least limits.
fn markdown(report: &Report) -> Result<(), Failure> {
    report.line("| backend | op | f32 | f16 | bf16 |")?;
    report.line("|---|---|---|---|---|")?;
    let cpu = Cpu::new()?;
    for name in BackendName::ALL {
        let support = |op, dtype| {
            let spec = whole_contract(op, dtype)?;
            match name {
                BackendName::Cpu => cpu.support(&spec),
                BackendName::Wgpu => {
                    use fam::wgpu::wgpu::{Features, Limits};
                    fam::wgpu::support(&spec, &Limits::default(), Features::empty())
                }
                _ => Err(fam::Error::no_kernel(op, dtype, name.name())),
            }
        };
        let row = |op| Dtype::ALL.map(|dtype| if support(op, dtype).is_ok() { "yes" } else { "–" });
        if Op::ALL.into_iter().all(|op| row(op) == ["–"; 3]) {
            report.line(format!("| {name} | | not in this version | | |"))?;
            continue;
        }
        for op in Op::ALL {
            report.line(format!("| {name} | `{op}` | {} |", row(op).join(" | ")))?;
        }
    }
    Ok(())
}
