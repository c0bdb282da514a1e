//! A memory with a place, and a plan that no backend made.

use fam_core::*;

/// Memory of a given size in buffer 7, so that overlaps are checked.
#[derive(Debug)]
pub struct Region {
    pub first: u64,
    pub bytes: u64,
}

impl Memory for Region {
    fn bytes(&self) -> u64 {
        self.bytes
    }
    fn place(&self) -> Option<(u64, u64)> {
        Some((7, self.first))
    }
}

pub struct TestPlan(pub Spec, pub Support);

impl Plan for TestPlan {
    fn spec(&self) -> &Spec {
        &self.0
    }
    fn support(&self) -> &Support {
        &self.1
    }
}

pub fn region(first: u64) -> Region {
    Region { first, bytes: 1 << 20 }
}

pub fn shape() -> ShapeBuilder {
    Shape::builder().heads(4).kv_heads(2).head_dim(8).block_len(4).window(Window::Blocks(1)).mem_len(3)
}

pub fn plan(spec: SpecBuilder) -> TestPlan {
    TestPlan(spec.build().unwrap(), Support::new(vec![]).ring_bytes(1 << 16))
}

pub fn field(error: Error) -> String {
    match error {
        Error::Invalid { field, .. } => field.into(),
        Error::LimitExceeded { what, .. } => what.into(),
        Error::Unsupported { what, .. } => what.into(),
        other => panic!("unexpected {other:?}"),
    }
}
