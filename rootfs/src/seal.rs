//! What a finished file was when it was made, kept beside it as `<file>.seal`.
//!
//! A file is whole while its length and time are those of its seal, which costs one look; when only the time differs
//! (a copied cache), its content decides. Damage below the file system that changes neither is not seen.

use std::{
    ffi::OsString,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    digest::hex,
    scratch::{Scratch, finish},
    store::{StoreError, copy_hashed, io_error},
};

#[derive(Debug, Serialize, Deserialize)]
struct Seal {
    /// In bytes.
    length: u64,
    modified: SystemTime,
    sha256: String,
}

/// What has become of a sealed file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// It is what was sealed.
    Whole,
    /// It or its seal is not there: it was never finished, or removed.
    Absent,
    /// It is something else.
    Damaged,
}

/// Gives everything that `content` holds the name `path` and seals it.
pub(crate) fn publish(scratch: &Scratch, content: impl Read, path: &Path) -> Result<(), StoreError> {
    let mut file = scratch.file()?;
    let (sha256, length) = copy_hashed(&path.display().to_string(), content, &mut file)?;
    let modified = finish(file, path)?.modified().map_err(io_error("read", path))?;
    let seal = Seal {
        length,
        modified,
        sha256,
    };
    let text = serde_json::to_vec(&seal).map_err(|error| io_error("describe", path)(error.into()))?;
    scratch.publish(&text, &beside(path))
}

/// Tells what has become of a file.
pub(crate) fn check(path: &Path) -> Condition {
    let seal = fs::read(beside(path))
        .ok()
        .and_then(|text| serde_json::from_slice::<Seal>(&text).ok());
    let (Some(seal), Ok(data)) = (seal, fs::metadata(path)) else {
        return Condition::Absent;
    };
    if data.len() != seal.length || !data.is_file() {
        return Condition::Damaged;
    }
    if data.modified().is_ok_and(|modified| modified == seal.modified) {
        return Condition::Whole;
    }
    if sha256_of(path).is_ok_and(|sha256| sha256 == seal.sha256) {
        // So that the next look is cheap again; where it is not allowed, it stays dear.
        let _ = fs::File::options()
            .write(true)
            .open(path)
            .and_then(|file| file.set_modified(seal.modified));
        return Condition::Whole;
    }
    Condition::Damaged
}

/// The path of a file's seal.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".seal");
    PathBuf::from(name)
}

fn sha256_of(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = fs::File::open(path)?;
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            length => hasher.update(&buffer[..length]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whole_until_its_content_changes() {
        let cache = tempfile::tempdir().unwrap();
        let scratch = Scratch::open(cache.path()).unwrap();
        let path = cache.path().join("image");
        assert_eq!(check(&path), Condition::Absent);
        fs::write(&path, "good").unwrap();
        assert_eq!(check(&path), Condition::Absent, "never sealed");
        publish(&scratch, b"good".as_slice(), &path).unwrap();
        let sealed = fs::metadata(&path).unwrap().modified().unwrap();
        assert_eq!(check(&path), Condition::Whole);

        let touch = || {
            fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_modified(SystemTime::UNIX_EPOCH)
                .unwrap()
        };
        touch();
        assert_eq!(check(&path), Condition::Whole);
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), sealed);
        fs::write(&path, "evil").unwrap();
        touch();
        assert_eq!(check(&path), Condition::Damaged);
        fs::write(&path, "cut").unwrap();
        assert_eq!(check(&path), Condition::Damaged);
        fs::write(&path, "good").unwrap();
        fs::write(beside(&path), "no seal").unwrap();
        assert_eq!(check(&path), Condition::Absent);
    }
}
