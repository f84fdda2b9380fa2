//! Initramfs segments: `cpio` archives of form newc, the same bytes for the same files.
//!
//! The kernel unpacks segments that follow each other, so a host may append its own to a finished one.

use std::io::{self, Write as _};

use cpio::newc::{Builder, ModeFileType, trailer};

/// One file of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitramfsFile {
    /// Path without a leading slash.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Its content.
    pub bytes: Vec<u8>,
}

/// A segment with `directories` first, then `files`, in the order given; its length is a multiple of 4.
///
/// # Errors
/// When a file has 4 GiB or more.
pub fn segment(directories: &[&str], files: &[InitramfsFile]) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    let mut inode = 0;
    let mut entry = |path: &str, kind: ModeFileType, mode: u32| {
        inode += 1;
        // mtime, owner and device stay zero.
        Builder::new(path)
            .ino(inode)
            .mode(mode)
            .set_mode_file_type(kind)
            .nlink(1)
    };
    for path in directories {
        output = entry(path, ModeFileType::Directory, 0o755)
            .write(output, 0)
            .finish()?;
    }
    for file in files {
        let too_long = |_| io::Error::other("a file of 4 GiB or more does not fit into an initramfs");
        let length = u32::try_from(file.bytes.len()).map_err(too_long)?;
        let mut writer = entry(&file.path, ModeFileType::Regular, file.mode).write(output, length);
        writer.write_all(&file.bytes)?;
        output = writer.finish()?;
    }
    output = trailer(output)?;
    output.resize(output.len().next_multiple_of(4), 0);
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn a_segment_holds_what_was_put_in_and_is_aligned() {
        let file = |path: &str, mode, bytes: &[u8]| InitramfsFile {
            path: path.to_owned(),
            mode,
            bytes: bytes.to_vec(),
        };
        let files = [
            file("init", 0o755, b"#!x"),
            file("modules/000-a.ko", 0o644, b"12345"),
        ];
        let bytes = segment(&["modules"], &files).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(bytes, segment(&["modules"], &files).unwrap());
        let mut reader = cpio::newc::Reader::new(bytes.as_slice()).unwrap();
        let mut seen = Vec::new();
        while !reader.entry().is_trailer() {
            let (name, mode, mtime) = (
                reader.entry().name().to_owned(),
                reader.entry().mode(),
                reader.entry().mtime(),
            );
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            assert_eq!(mtime, 0);
            seen.push((name, mode, content));
            reader = cpio::newc::Reader::new(reader.finish().unwrap()).unwrap();
        }
        let expected = [
            ("modules".to_owned(), 0o040_755, Vec::new()),
            ("init".to_owned(), 0o100_755, b"#!x".to_vec()),
            ("modules/000-a.ko".to_owned(), 0o100_644, b"12345".to_vec()),
        ];
        assert_eq!(seen, expected);
    }
}
