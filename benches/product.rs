//! The micro-kernel of every product, out of L1, by level and by the size of the block that is held in registers.

use fam::cpu::Isa;

fn main() -> fam::Result<()> {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for ([vectors, values], speed) in isa.product_speeds()? {
            println!("{isa:8} {vectors} x {values:2}: {:4.0} GFLOP/s", speed / 1e9);
        }
    }
    Ok(())
}
