//! Snapshots that are cut, flipped or edited: a typed error, and the target as it was.

use crate::fixture::{Blob, Feed, Layer, random, shapes};
use fam::{Error, Window};

/// Bytes before the payload: magic with version, 15 fields; and behind it: CRC-32.
const MAGIC: usize = 8;
const FIELDS: usize = 15;
const HEADER: usize = MAGIC + 8 * FIELDS;

/// Fields of the header that describe the stream.
const ORIGIN: usize = 10;
const POSITION: usize = 11;
const MEM_ROWS: usize = 12;
const STAGED: usize = 13;
const STAGED_ROWS: usize = 14;

/// A snapshot, and a layer whose slot it must not reach.
struct Target {
    layer: Layer,
    before: Blob,
    snapshot: Vec<u8>,
    refused: usize,
}

impl Target {
    fn new(index: usize) -> Self {
        let shape = shapes()[index];
        let [mut source, mut layer] = [(); 2].map(|()| Layer::new(&shape, 1));
        source.run_to(0, Feed(1), 12, 4);
        source.enter_block(0, Feed(1));
        layer.run_to(0, Feed(2), 6, 4);
        Target { before: layer.snapshot(0), snapshot: source.snapshot(0).0, layer, refused: 0 }
    }

    /// Asserts that `bytes` are refused; the reason.
    #[track_caller]
    fn refuses(&mut self, bytes: &[u8]) -> String {
        let reason = match self.layer.restore(0, bytes) {
            Err(Error::Malformed { what: "snapshot", reason }) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(self.layer.snapshot(0), self.before, "{reason}");
        self.refused += 1;
        reason
    }

    /// The snapshot with other fields, and a checksum that fits.
    fn edited(&self, edits: &[(usize, u64)]) -> Vec<u8> {
        let mut bytes = self.snapshot.clone();
        for (field, value) in edits {
            bytes[MAGIC + 8 * field..][..8].copy_from_slice(&value.to_le_bytes());
        }
        seal(bytes)
    }

    fn field(&self, field: usize) -> u64 {
        u64::from_le_bytes(self.snapshot[MAGIC + 8 * field..][..8].try_into().unwrap())
    }
}

/// Replaces the checksum.
fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - 4;
    let checksum = crc32fast::hash(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&checksum);
    bytes
}

#[test]
fn every_truncation_and_every_flipped_bit() {
    let mut refused = 0;
    for index in 0..shapes().len() {
        let mut target = Target::new(index);
        let whole = target.snapshot.clone();
        for len in 0..whole.len() {
            target.refuses(&whole[..len]);
        }
        target.refuses(&[&whole[..], &[0]].concat());
        target.refuses(&[&whole[..], &whole[..]].concat());
        // Every bit of header and checksum, one of each byte between.
        for bit in 0..8 * whole.len() {
            let byte = bit / 8;
            if byte < HEADER || byte >= whole.len() - 4 || bit % 8 == byte % 8 {
                let mut bytes = whole.clone();
                bytes[byte] ^= 1 << (bit % 8);
                target.refuses(&bytes);
            }
        }
        refused += target.refused;
        target.layer.restore(0, &whole).unwrap();
    }
    assert!(refused >= 8_000, "{refused}");
}

#[test]
fn random_bytes() {
    let mut target = Target::new(4);
    for seed in 0..2_000 {
        let mut bytes = target.snapshot.clone();
        let first = random([seed, 0, 0, 0]) as usize % bytes.len();
        let len = 1 + random([seed, 1, 0, 0]) as usize % (bytes.len() - first).min(64);
        for (i, byte) in bytes[first..first + len].iter_mut().enumerate() {
            *byte = random([seed, 2, i as u64, 0]) as u8;
        }
        if bytes != target.snapshot {
            target.refuses(&bytes);
        }
    }
}

#[test]
fn another_version_and_no_snapshot_at_all() {
    let mut target = Target::new(0);
    for version in [0, 2, 255] {
        let mut bytes = target.snapshot.clone();
        bytes[7] = version;
        assert!(target.refuses(&seal(bytes)).starts_with(&format!("version {version},")));
    }
    let mut bytes = target.snapshot.clone();
    bytes[0] = b'F';
    assert!(target.refuses(&seal(bytes)).contains("magic"));
    assert!(target.refuses(b"").contains("0 bytes"));
    assert!(target.refuses(&[b'x'; 4096]).contains("magic"));
}

/// Fields of the shape, under a checksum that fits: the field is named.
#[test]
fn a_header_of_another_shape() {
    let names =
        ["heads", "kv_heads", "head_dim", "block_len", "window kind", "window", "mem_len", "dtype", "scale", "infini rule"];
    for index in 0..shapes().len() {
        let mut target = Target::new(index);
        for (field, name) in names.iter().enumerate() {
            let own = target.field(field);
            for value in [0, 1, 2, own ^ 1, own + 1, own << 32, 1 << 40, u64::MAX / 2, u64::MAX] {
                if value != own {
                    let reason = target.refuses(&target.edited(&[(field, value)]));
                    assert!(reason.starts_with(&format!("{name} {value}, ")), "{reason}");
                }
            }
        }
    }
}

/// Fields of the stream that no stream can have, under a checksum that fits.
#[test]
fn a_header_of_an_impossible_stream() {
    for index in 0..shapes().len() {
        let mut target = Target::new(index);
        let position = target.field(POSITION);
        let huge = [1 << 31, 1 << 32, 1_000_000_000_000, u64::MAX / 2, u64::MAX - 1, u64::MAX];
        for origin in huge.into_iter().chain([position + 1]) {
            assert!(target.refuses(&target.edited(&[(ORIGIN, origin)])).contains("origin"));
        }
        for position in [u64::MAX / 2 + 1, u64::MAX - 3, u64::MAX] {
            assert!(target.refuses(&target.edited(&[(POSITION, position)])).contains("position"));
            target.refuses(&target.edited(&[(POSITION, position), (ORIGIN, position)]));
        }
        for many in huge {
            assert!(target.refuses(&target.edited(&[(MEM_ROWS, many)])).contains("memory"));
            assert!(target.refuses(&target.edited(&[(STAGED, many)])).contains("staged"));
            assert!(target.refuses(&target.edited(&[(STAGED, 2), (STAGED_ROWS, many)])).contains("staged"));
        }
        target.refuses(&target.edited(&[(STAGED, 0), (STAGED_ROWS, 1)]));
        target.refuses(&target.edited(&[(STAGED, 3)]));
        // Lengths that the payload does not have.
        let most = target.layer.shape().mem_len() as u64;
        for rows in 0..=most {
            if rows != target.field(MEM_ROWS) {
                target.refuses(&target.edited(&[(MEM_ROWS, rows)]));
            }
            if rows != target.field(STAGED_ROWS) {
                target.refuses(&target.edited(&[(STAGED_ROWS, rows)]));
            }
        }
        target.refuses(&target.edited(&[(POSITION, position + 1)]));
        if target.layer.shape().window() != Window::Blocks(0) {
            target.refuses(&target.edited(&[(ORIGIN, position)]));
        }
    }
}

/// Inside a block a memory is not due, and before the second block none has served yet.
#[test]
fn a_header_of_a_memory_that_is_due_inside_a_block() {
    let mut target = Target::new(0);
    let mut source = Layer::new(&target.layer.shape(), 1);
    source.run_to(0, Feed(1), 3, 4);
    target.snapshot = source.snapshot(0).0;
    assert_eq!([MEM_ROWS, STAGED, STAGED_ROWS].map(|field| target.field(field)), [0, 2, 1]);
    // As many rows, but of a block before the first.
    assert!(target.refuses(&target.edited(&[(MEM_ROWS, 1), (STAGED, 1), (STAGED_ROWS, 0)])).contains("memory of 1 rows"));
    source.run_to(0, Feed(1), 10, 4);
    target.snapshot = source.snapshot(0).0;
    assert_eq!([MEM_ROWS, STAGED, STAGED_ROWS].map(|field| target.field(field)), [3, 2, 3]);
    assert!(target.refuses(&target.edited(&[(STAGED, 0), (STAGED_ROWS, 0)])).contains("staged 0"));
    let whole = target.snapshot.clone();
    target.layer.restore(0, &whole).unwrap();
}

/// Whatever a forged header says, it is refused or it describes a stream that goes on.
#[test]
fn forged_headers() {
    for index in 0..shapes().len() {
        let mut target = Target::new(index);
        for seed in 0..2_000 {
            let draw = |i| random([seed, i, index as u64, 1]);
            let edits: Vec<_> = (0..1 + draw(0) % 3)
                .map(|i| {
                    let field = ORIGIN + draw(10 + i) as usize % 5;
                    let own = target.field(field);
                    let value = match draw(20 + i) % 4 {
                        0 => draw(30 + i) % 20,
                        1 => own.wrapping_add(draw(30 + i) % 9).wrapping_sub(4),
                        2 => own ^ 1 << (draw(30 + i) % 64),
                        _ => draw(30 + i),
                    };
                    (field, value)
                })
                .collect();
            let bytes = target.edited(&edits);
            match target.layer.restore(0, &bytes) {
                Err(Error::Malformed { .. }) => assert_eq!(target.layer.snapshot(0), target.before),
                Ok(()) => {
                    assert_eq!(target.layer.snapshot(0), Blob(bytes), "{edits:?}");
                    let position = target.layer.position(0);
                    target.layer.run_to(0, Feed(3), position + 9, 4);
                    let before = target.before.clone();
                    target.layer.restore(0, &before).unwrap();
                }
                Err(other) => panic!("{other} for {edits:?}"),
            }
        }
    }
}
