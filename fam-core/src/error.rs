//! One error type for every crate: what was asked, and which rule it broke.

use crate::{Dtype, Op};

/// What an operation of this workspace returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request was refused or failed.
///
/// Everything but [`Error::DeviceLost`] is found before anything is enqueued: no output byte and no state has changed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value that breaks a rule of the contract.
    #[error("{field} = {value}: {rule}")]
    Invalid {
        /// The argument or field at fault.
        field: &'static str,
        /// Its value, printed.
        value: String,
        /// The rule that it breaks.
        rule: String,
    },
    /// A valid request that this backend (or this version) does not serve.
    #[error("unsupported {what} = {got}; allowed: {allowed}")]
    Unsupported {
        /// The property at fault.
        what: &'static str,
        /// Its value, printed.
        got: String,
        /// What is served instead.
        allowed: String,
    },
    /// A size beyond a limit of the contract, the plan or the device.
    #[error("{what}: {requested} requested, at most {max}")]
    LimitExceeded {
        /// The limited quantity, with its unit.
        what: &'static str,
        /// The size asked for (saturated at `u64::MAX` where a product overflows).
        requested: u64,
        /// The largest size allowed.
        max: u64,
    },
    /// Memory for a construction could not be had. Never returned by an operation: those do not allocate.
    #[error("out of memory: {requested} bytes requested")]
    OutOfMemory {
        /// Bytes asked for.
        requested: u64,
    },
    /// The backend cannot run on this machine: no driver, no library or no device.
    #[error("backend {backend} is unavailable: {reason}")]
    BackendUnavailable {
        /// The backend's name.
        backend: &'static str,
        /// What was missing.
        reason: String,
    },
    /// The device stopped working; later calls fail at once with this error.
    #[error("device lost: {reason}")]
    DeviceLost {
        /// What the driver said.
        reason: String,
    },
    /// The stream enters a block whose memory was neither set nor kept.
    #[error("slot {slot}: block {block} has no memory yet; call set_memory or keep_memory first")]
    MemoryDue {
        /// The slot.
        slot: u32,
        /// The block about to be entered.
        block: u64,
    },
    /// Work of this slot was lost on its way to the device; restore or reset the slot.
    #[error("slot {slot} is poisoned: restore a snapshot or reset it")]
    Poisoned {
        /// The slot.
        slot: u32,
    },
    /// Bytes that are not a valid snapshot or case file.
    #[error("{what}: {reason}")]
    Malformed {
        /// What was being read.
        what: &'static str,
        /// Which check failed.
        reason: String,
    },
}

impl Error {
    /// An [`Error::Invalid`] from anything printable.
    pub fn invalid(field: &'static str, value: impl ToString, rule: impl Into<String>) -> Self {
        Error::Invalid { field, value: value.to_string(), rule: rule.into() }
    }

    /// An [`Error::Unsupported`] from anything printable.
    pub fn unsupported(what: &'static str, got: impl ToString, allowed: impl Into<String>) -> Self {
        Error::Unsupported { what, got: got.to_string(), allowed: allowed.into() }
    }

    /// A backend that has no kernel for `op`.
    pub fn no_kernel(op: Op, dtype: Dtype, backend: &'static str) -> Self {
        Error::unsupported("op", format_args!("{op} in {dtype} on {backend}"), "see Backend::support")
    }

    /// An [`Error::Malformed`].
    pub fn malformed(what: &'static str, reason: impl Into<String>) -> Self {
        Error::Malformed { what, reason: reason.into() }
    }
}
