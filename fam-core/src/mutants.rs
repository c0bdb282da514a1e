//! Deliberate errors in shipped code, to prove that the conformance tests see them. Compiled only under `--cfg fam_mutants`.

/// `mutate!("name", right, wrong)` is `right`. Under `--cfg fam_mutants` it is `wrong` while the mutant `name` is selected.
#[doc(hidden)]
#[macro_export]
macro_rules! mutate {
    ($name:literal, $right:expr, $wrong:expr) => {{
        #[cfg(fam_mutants)]
        {
            const ID: u64 = $crate::mutants::id($name);
            if $crate::mutants::is_selected(ID) { $wrong } else { $right }
        }
        #[cfg(not(fam_mutants))]
        {
            $right
        }
    }};
}

#[cfg(fam_mutants)]
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[cfg(fam_mutants)]
static SELECTED: AtomicU64 = AtomicU64::new(0);

/// FNV-1a of the name: distinct for the few names there are.
#[cfg(fam_mutants)]
#[must_use]
pub const fn id(name: &str) -> u64 {
    let bytes = name.as_bytes();
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x100_0000_01b3);
        i += 1;
    }
    hash
}

/// Whether the mutant with this id is on.
#[cfg(fam_mutants)]
#[must_use]
pub fn is_selected(id: u64) -> bool {
    SELECTED.load(Relaxed) == id
}

/// Turns one mutant on, and any other off; `None` restores the shipped code.
#[cfg(fam_mutants)]
pub fn select(name: Option<&str>) {
    SELECTED.store(name.map_or(0, id), Relaxed);
}
