//! What the guest's console printed: a bounded ring of two files, and its last lines.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A file is set aside when it has this many bytes.
const FILE_BYTES: u64 = 512 << 10;
/// Bytes kept in memory for evidence.
const TAIL_BYTES: usize = 8 << 10;

/// The ring: `path` and, before it, `path.1`.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    file: File,
    written: u64,
    tail: VecDeque<u8>,
}

impl Console {
    /// Begins a boot's console; the last boot's is set aside.
    ///
    /// # Errors
    /// The system's own.
    pub fn begin(path: &Path) -> io::Result<Self> {
        if path.exists() {
            fs::rename(path, older(path))?;
        }
        Ok(Self {
            path: path.to_owned(),
            file: open(path)?,
            written: 0,
            tail: VecDeque::with_capacity(TAIL_BYTES),
        })
    }

    /// Appends what came.
    ///
    /// # Errors
    /// The system's own, such as a full disk; the tail has the bytes all the same.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        for byte in bytes {
            if self.tail.len() == TAIL_BYTES {
                self.tail.pop_front();
            }
            self.tail.push_back(*byte);
        }
        if self.written + bytes.len() as u64 > FILE_BYTES {
            fs::rename(&self.path, older(&self.path))?;
            self.file = open(&self.path)?;
            self.written = 0;
        }
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// The last lines as text.
    #[must_use]
    pub fn tail(&self) -> String {
        String::from_utf8_lossy(&self.tail.iter().copied().collect::<Vec<u8>>()).into_owned()
    }
}

/// The panic line of a console's tail, if there is one.
#[must_use]
pub fn panic_line(tail: &str) -> Option<&str> {
    tail.lines()
        .find(|line| line.contains("Kernel panic - not syncing"))
        .map(str::trim)
}

fn older(path: &Path) -> PathBuf {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    older.into()
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_is_bounded_and_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut console = Console::begin(&path).unwrap();
        for n in 0..3_000 {
            console.append(format!("{n:0>1000}\n").as_bytes()).unwrap();
        }
        let size = |p: &Path| fs::metadata(p).unwrap().len();
        assert!(size(&path) <= FILE_BYTES && size(&older(&path)) <= FILE_BYTES);
        assert!(console.tail().ends_with("2999\n"));
        assert!(console.tail().len() <= TAIL_BYTES);
    }

    #[test]
    fn a_panic_is_found() {
        let tail = "a\r\n[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs\r\nb";
        assert_eq!(
            panic_line(tail),
            Some("[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs")
        );
        assert_eq!(panic_line("fine"), None);
    }
}
