//! Case and output files that are truncated, corrupted or lie: a typed error or a valid file, never a panic, and never an allocation
//! that the file's own size does not justify.

use fam_core::Error;
use fam_testkit::{Case, CaseFile, Filter, Rng, case_file, case_seed, read_outputs};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator, noting the largest allocation asked of it.
struct Noting;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on unchanged to the system's allocator.
unsafe impl GlobalAlloc for Noting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Relaxed);
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, size) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Noting = Noting;

/// The largest allocation is of the whole process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Small files of both ops.
fn files() -> Vec<Vec<u8>> {
    let cases = (0..).filter_map(|i| Case::generate(case_seed(5, i), &Filter::default()));
    let files = cases.filter_map(|case| case_file(&case).unwrap()).map(|file| file.to_bytes().unwrap());
    let mut files: Vec<_> = files.filter(|bytes| bytes.len() < 60_000).take(12).collect();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/smollm2_infini_l05_f32.safetensors");
    files.push(std::fs::read(folder).unwrap());
    files
}

/// Reads, and checks what the reading cost. True for a typed error.
fn is_refused(bytes: &[u8]) -> bool {
    LARGEST.store(0, Relaxed);
    let result = CaseFile::read(bytes);
    let largest = LARGEST.load(Relaxed);
    assert!(largest <= 2 * bytes.len() + 4096, "{largest} bytes asked for, of a file of {}", bytes.len());
    match result {
        Ok(_) => false,
        Err(error) => {
            assert!(matches!(
                error,
                Error::Invalid { .. } | Error::Malformed { .. } | Error::LimitExceeded { .. } | Error::Unsupported { .. }
            ));
            let line = error.to_string();
            assert!(!line.contains('\n') && !line.is_empty(), "one line: {line:?}");
            true
        }
    }
}

#[test]
fn ten_thousand_corruptions() {
    let _alone = ALONE.lock().unwrap_or_else(|p| p.into_inner());
    let files = files();
    let mut rng = Rng::new(11);
    let (mut refused, mut valid) = (0, 0);
    for i in 0..10_000 {
        // The large file now and then.
        let mut bytes = files[if i % 100 == 0 { files.len() - 1 } else { rng.below(files.len() - 1) }].clone();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        match rng.below(8) {
            0 => bytes.truncate(rng.below(bytes.len())),
            1 => bytes.truncate(rng.below(header)),
            2 => bytes.extend_from_slice(&[0; 3]),
            3 => bytes[rng.below(8)] = rng.next() as u8,
            4 => {
                // A digit of a size, an offset or a metadata number.
                let digits: Vec<usize> = (8..header).filter(|&at| bytes[at].is_ascii_digit()).collect();
                bytes[rng.pick(&digits)] = b'0' + rng.below(10) as u8;
            }
            5 => {
                // A number with many more digits.
                let digits: Vec<usize> = (8..header).filter(|&at| bytes[at].is_ascii_digit()).collect();
                let at = rng.pick(&digits);
                let more = rng.pick(&["000000000000", "9999999999999999999", "00", "e9", "-"]);
                bytes.splice(at..at, more.bytes());
                let length = (header - 8 + more.len()) as u64;
                bytes[..8].copy_from_slice(&length.to_le_bytes());
            }
            6 => {
                for _ in 0..=rng.below(4) {
                    let at = 8 + rng.below(header - 8);
                    bytes[at] = rng.next() as u8;
                }
            }
            _ => {
                // A piece of the header once more: names and braces twice.
                let from = 8 + rng.below(header - 8);
                let piece = bytes[from..(from + rng.below(60)).min(header)].to_vec();
                bytes.splice(from..from, piece.iter().copied());
                let length = (header - 8 + piece.len()) as u64;
                bytes[..8].copy_from_slice(&length.to_le_bytes());
            }
        }
        if is_refused(&bytes) { refused += 1 } else { valid += 1 }
    }
    println!("{refused} refused, {valid} still valid");
    assert!(refused > 8_000, "{refused} refused, {valid} still valid");
}

/// A file with this header and `data` bytes of zeros behind it.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

const METADATA: &str = r#""__metadata__":{"format":"1","op":"attend","block_len":"2","window_blocks":"1","scale":"0.5"}"#;
const KV: &str = r#""k":{"dtype":"F32","shape":[1,4,1,2],"data_offsets":[32,64]},"v":{"dtype":"F32","shape":[1,4,1,2],"data_offsets":[64,96]}"#;
const Q: &str = r#""q":{"dtype":"F32","shape":[1,4,1,2],"data_offsets":[0,32]}"#;

#[test]
fn lies_are_named() {
    let _alone = ALONE.lock().unwrap_or_else(|p| p.into_inner());
    assert!(CaseFile::read(&file(&format!("{{{METADATA},{Q},{KV}}}"), 96)).is_ok());
    let with = |metadata: &str, q: &str, kv: &str| format!("{{{metadata},{q},{kv}}}");
    let edit = |from: &str, to: &str| with(&METADATA.replace(from, to), Q, KV);
    let infini = |metadata: &str| METADATA.replace(r#""op":"attend""#, &format!(r#""op":"infini"{metadata}"#));
    let cases: Vec<(&str, String, &[&str])> = vec![
        ("10^12 tokens", with(METADATA, &Q.replace("[1,4,1,2]", "[1,1000000000000,1,2]"), KV), &["q", "1000000000000"]),
        ("sizes that overflow", with(METADATA, &Q.replace("[1,4,1,2]", "[18446744073709551615,4,16,2]"), KV), &["q"]),
        (
            "streams without tokens",
            with(
                METADATA,
                r#""q":{"dtype":"F32","shape":[2147483648,0,1,2],"data_offsets":[0,0]}"#,
                &KV.replace("[1,4,1,2]", "[2147483648,0,1,2]").replace("[32,64]", "[0,0]").replace("[64,96]", "[0,0]"),
            ),
            &["q", "2147483648"],
        ),
        ("wrong rank", with(METADATA, &Q.replace("[1,4,1,2]", "[4,2]"), KV), &["q", "[4, 2]", "4 axes"]),
        (
            "mixed dtypes",
            with(METADATA, Q, &KV.replacen(r#""F32","shape":[1,4,1,2]"#, r#""F16","shape":[1,8,1,2]"#, 1)),
            &["k", "F16", "F32"],
        ),
        ("missing tensor", format!("{{{METADATA},{KV}}}").replace("32,64", "0,32").replace("64,96", "32,64"), &["q", "absent"]),
        (
            "unknown tensor",
            with(METADATA, &Q.replace("\"q\"", "\"q\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},\"zz\""), KV),
            &["zz"],
        ),
        ("duplicate tensor", with(METADATA, &format!("{Q},{Q}"), KV), &["q", "twice"]),
        ("duplicate metadata", with(&format!("{METADATA},{METADATA}"), Q, KV), &["twice"]),
        ("duplicate metadata key", edit(r#""op":"attend""#, r#""op":"infini","op":"attend""#), &["op", "twice"]),
        ("infinite scale", edit(r#""scale":"0.5""#, r#""scale":"inf""#), &["scale", "inf", "finite"]),
        ("scale that is no number", edit(r#""scale":"0.5""#, r#""scale":"NaN""#), &["scale", "NaN", "finite"]),
        ("scale beyond f32", edit(r#""scale":"0.5""#, r#""scale":"1e300""#), &["scale", "finite"]),
        (
            "both windows",
            edit(r#""window_blocks":"1""#, r#""window_blocks":"1","window_tokens":"4""#),
            &["window_", "exactly one"],
        ),
        ("no window", edit(r#""window_blocks":"1","#, ""), &["window_", "absent"]),
        ("window of no token", edit(r#""window_blocks":"1""#, r#""window_tokens":"0""#), &["window", "0", "at least 1"]),
        ("bad rule", with(&infini(r#","rule":"quadratic""#), Q, KV), &["rule", "quadratic"]),
        ("no rule", with(&infini(""), Q, KV), &["rule", "absent"]),
        ("no beta", with(&infini(r#","rule":"delta""#), Q, KV), &["beta", "absent"]),
        ("bad format", edit(r#""format":"1""#, r#""format":"2""#), &["format", "2"]),
        ("bad op", edit(r#""op":"attend""#, r#""op":"attention""#), &["op", "attention"]),
        ("no block", edit(r#""block_len":"2""#, r#""block_len":"0""#), &["block_len", "0", "at least 1"]),
        ("negative block", edit(r#""block_len":"2""#, r#""block_len":"-2""#), &["block_len", "-2"]),
        ("late start", with(METADATA, &format!(r#"{Q},"start":{{"dtype":"I64","shape":[1],"data_offsets":[96,104]}}"#), KV), &[]),
        ("data past the end", with(METADATA, Q, &KV.replace("[64,96]", "[64,128]")), &["v", "128"]),
        ("overlapping tensors", with(METADATA, Q, &KV.replace("[64,96]", "[32,64]")), &[]),
    ];
    for (name, header, mentions) in cases {
        let data = match name {
            "late start" => 104,
            "streams without tokens" => 0,
            "missing tensor" => 64,
            _ => 96,
        };
        let bytes = file(&header, data);
        if name == "late start" {
            assert!(CaseFile::read(&bytes).is_ok());
            let mut late = bytes;
            let end = late.len();
            late[end - 8..].copy_from_slice(&(-1i64).to_le_bytes());
            assert!(is_refused(&late), "{name}");
            continue;
        }
        assert!(is_refused(&bytes), "{name}: {header}");
        let error = CaseFile::read(&bytes).unwrap_err().to_string();
        for mention in mentions {
            assert!(error.contains(mention), "{name}: {error:?} does not name {mention:?}");
        }
    }
}

/// A wide head makes a state far larger than the file that asks for it.
#[test]
fn amplified_state_is_refused() {
    let _alone = ALONE.lock().unwrap_or_else(|p| p.into_inner());
    let d = 40_000;
    let tensor = |name: &str, i: usize| {
        format!(r#""{name}":{{"dtype":"F32","shape":[1,1,1,{d}],"data_offsets":[{},{}]}}"#, i * 4 * d, (i + 1) * 4 * d)
    };
    let beta = format!(r#""beta":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}"#, 12 * d, 12 * d + 4);
    let metadata = METADATA.replace(r#""op":"attend""#, r#""op":"infini","rule":"linear""#);
    let header = format!("{{{metadata},{},{},{},{beta}}}", tensor("q", 0), tensor("k", 1), tensor("v", 2));
    assert!(is_refused(&file(&header, 12 * d + 4)));
}

#[test]
fn output_files_too() {
    let _alone = ALONE.lock().unwrap_or_else(|p| p.into_inner());
    let case = CaseFile::read(&file(&format!("{{{METADATA},{Q},{KV}}}"), 96)).unwrap();
    let o = r#""o":{"dtype":"F32","shape":[1,4,1,2],"data_offsets":[0,32]}"#;
    assert!(read_outputs(&file(&format!("{{{o}}}"), 32), &case).is_ok());
    for (header, mention) in [
        (format!("{{{}}}", o.replace("[1,4,1,2]", "[1,1000000000000,1,2]")), "1000000000000"),
        (format!("{{{}}}", o.replace("[1,4,1,2]", "[4,2]")), "[4, 2]"),
        (format!("{{{o},{o}}}"), "twice"),
        (format!("{{{}}}", o.replace("\"o\"", "\"out\"")), "out"),
        ("{}".into(), "at least one output"),
    ] {
        let error = read_outputs(&file(&header, if header == "{}" { 0 } else { 32 }), &case).unwrap_err().to_string();
        assert!(error.contains(mention), "{error:?} does not name {mention:?}");
    }
}
