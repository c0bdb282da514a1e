//! The spans of a call as kernels read them.

use fam_core::{Keys, Span, Spans, Spec};

/// Host spans, validated; or device spans, cut to what the plan and the call's views serve wherever they are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpanSource<'a> {
    spans: Spans<'a, [u8]>,
    spec: &'a Spec,
    /// Rows of a linear key cache.
    key_rows: u64,
    /// Whether there are memory keys.
    mem: bool,
}

impl<'a> SpanSource<'a> {
    /// `keys` and `mem`: where the op reads cached keys from.
    pub fn new(spans: Spans<'a, [u8]>, spec: &'a Spec, keys: Option<&Keys<'_, [u8]>>, mem: bool) -> Self {
        let key_rows = match keys {
            Some(Keys::Strided { k, .. }) => k.layout.shape[2] as u64,
            _ => u64::MAX,
        };
        SpanSource { spans, spec, key_rows, mem }
    }

    /// N.
    pub fn batch(&self) -> usize {
        self.spans.batch()
    }

    /// The span of stream `n`.
    pub fn get(&self, n: usize) -> Span {
        let mut span = self.spans.get(n, self.spec);
        if let Spans::Device { .. } = self.spans {
            let keys = self.key_rows.saturating_sub(span.start - span.origin);
            span.len = u64::from(span.len).min(keys) as u32;
            if !self.mem {
                span.mem_rows = 0;
            }
        }
        span
    }

    /// Whether stream `n` writes its slot, and none before it does. Host spans are validated to name each slot once.
    pub fn is_first_of_slot(&self, n: usize, writes: fn(&Span) -> bool) -> bool {
        let span = self.get(n);
        let is_taken = || (0..n).map(|i| self.get(i)).any(|s| s.slot == span.slot && writes(&s));
        writes(&span) && (matches!(self.spans, Spans::Host(_)) || !is_taken())
    }

    /// Most tokens of a stream.
    pub fn max_rows(&self) -> usize {
        (0..self.batch()).map(|n| self.get(n).len as usize).max().unwrap_or(0)
    }

    /// Most blocks of a stream.
    pub fn max_blocks(&self) -> usize {
        let block_len = self.spec.shape().block_len();
        (0..self.batch()).map(|n| self.get(n).blocks(block_len)).max().unwrap_or(0)
    }
}
