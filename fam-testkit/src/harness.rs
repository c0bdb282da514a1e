//! What a backend hands to the conformance runner.

use crate::guard::POISON;
use crate::tolerance::Limits;
use fam_core::{Backend, Device, Result};

/// A queue of a harness's backend.
pub type Queue<'q, H> = <<H as Harness>::Backend as Backend>::Queue<'q>;
/// Owned memory of a harness's backend.
pub type Owned<H> = <<H as Harness>::Backend as Device>::Owned;
/// Borrowed memory of a harness's backend.
pub type Mem<H> = <<H as Harness>::Backend as Backend>::Mem;

/// A backend under test, and how to run work on it. The rest is provided: a CPU backend's harness is ten lines.
///
/// ```
/// # use fam_core::*;
/// # use fam_testkit::Harness;
/// struct OnCaller<B>(B);
///
/// impl<B: for<'q> Backend<Queue<'q> = ()> + Device + 'static> Harness for OnCaller<B> {
///     type Backend = B;
///     fn backend(&self) -> &B {
///         &self.0
///     }
///     fn run(&self, work: &mut dyn FnMut(&mut ()) -> Result<()>) -> Result<()> {
///         work(&mut ())
///     }
/// }
/// ```
pub trait Harness {
    /// The backend.
    type Backend: Device + 'static;

    /// The backend under test.
    fn backend(&self) -> &Self::Backend;

    /// Hands `work` a queue once, submits what it enqueued, and waits for it.
    ///
    /// # Errors
    /// What `work` returns, or what submitting and waiting bring.
    fn run(&self, work: &mut dyn FnMut(&mut Queue<'_, Self>) -> Result<()>) -> Result<()>;

    /// What the backend states of itself. Default: [`Limits::default`], the strictest.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Device memory that holds `bytes`.
    ///
    /// # Errors
    /// Those of [`Device::alloc`] and [`Device::upload`].
    fn upload(&self, bytes: &[u8]) -> Result<Owned<Self>> {
        let mut owned = self.backend().alloc(bytes.len() as u64)?;
        self.backend().upload(std::borrow::BorrowMut::borrow_mut(&mut owned), 0, bytes)?;
        Ok(owned)
    }

    /// The first `bytes` bytes of device memory.
    ///
    /// # Errors
    /// Those of [`Device::download`].
    fn download(&self, owned: &Owned<Self>, bytes: usize) -> Result<Vec<u8>> {
        let mut host = vec![0; bytes];
        self.backend().download(std::borrow::Borrow::borrow(owned), 0, &mut host)?;
        Ok(host)
    }

    /// Device memory of `bytes` bytes, every one of them NaN: rings and scratch, of which nothing may be read before it is written.
    ///
    /// # Errors
    /// Those of [`Harness::upload`].
    fn poisoned(&self, bytes: u64) -> Result<Owned<Self>> {
        self.upload(&vec![POISON; bytes as usize])
    }
}
