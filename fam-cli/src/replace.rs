//! A file that is there whole or not at all: written beside its place, then renamed.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A new file beside `path`, which it takes the place of in [`Replacement::finish`]. Dropped before that, it leaves nothing behind.
#[derive(Debug)]
pub struct Replacement {
    path: PathBuf,
    beside: PathBuf,
    file: File,
}

impl Replacement {
    /// Opens the new file, so that a place that cannot be written is found before the work. What stands at `path` stays.
    pub fn new(path: &Path) -> Result<Self, String> {
        let wrong = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        // Through links, so that a link stays one. What does not exist yet is made where it was asked for.
        let path = match path.canonicalize() {
            Ok(found) if !found.is_file() => return Err(wrong(&"there, and not a regular file")),
            Ok(found) => found,
            Err(_) => path.to_path_buf(),
        };
        let name = path.file_name().ok_or_else(|| wrong(&"not the name of a file"))?.to_string_lossy();
        let beside = path.with_file_name(format!(".{name}.{}", std::process::id()));
        let file = File::create(&beside).map_err(|e| wrong(&e))?;
        Ok(Replacement { path, beside, file })
    }

    /// Writes the bytes and moves them to their place.
    pub fn finish(mut self, bytes: &[u8]) -> Result<(), String> {
        let written = self.file.write_all(bytes).and_then(|()| std::fs::rename(&self.beside, &self.path));
        written.map_err(|e| format!("{}: {e}", self.path.display()))
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        // After the rename there is nothing to remove.
        let _ = std::fs::remove_file(&self.beside);
    }
}
