//! fam
fn main() {}
