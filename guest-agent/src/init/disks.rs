//! Finding disks by serial number and telling what is on one from its first and last bytes.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sovereign_protocol::boot::DATA_LABEL;

const PAUSE: Duration = Duration::from_millis(20);
/// What must be zero at both ends of a disk before it counts as blank.
pub const EDGE_BYTES: usize = 1 << 20;

// fs/ext4/ext4.h, offsets from the start of the disk
const EXT_SUPERBLOCK: usize = 1024;
const EXT_BLOCKS_LOW: usize = EXT_SUPERBLOCK + 0x04;
const EXT_LOG_BLOCK_SIZE: usize = EXT_SUPERBLOCK + 0x18;
const EXT_MAGIC: usize = EXT_SUPERBLOCK + 0x38;
const EXT_LABEL: usize = EXT_SUPERBLOCK + 0x78;

/// What is on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Zeros at both ends.
    Blank,
    /// An ext file system with our label.
    Ours {
        /// The size that the file system was made or grown to.
        bytes: u64,
    },
    /// An ext file system with another label.
    Labelled(String),
    /// Anything else.
    Foreign,
}

/// What is to be done with the data disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Make a file system, then mount.
    Format,
    /// Check and mount; grow it when the disk has become larger.
    Mount {
        /// The disk is larger than its file system.
        grow: bool,
    },
    /// Leave it alone.
    Refuse {
        /// A code for programs.
        reason: &'static str,
        /// What was seen.
        evidence: String,
    },
}

/// Tells what is on a disk from its first and last bytes.
#[must_use]
pub fn classify(head: &[u8], tail: &[u8]) -> Content {
    if head.iter().chain(tail).all(|byte| *byte == 0) {
        return Content::Blank;
    }
    if head.get(EXT_MAGIC..EXT_MAGIC + 2) != Some(&[0x53, 0xef]) {
        return Content::Foreign;
    }
    let label = head.get(EXT_LABEL..EXT_LABEL + 16).unwrap_or_default();
    let label = String::from_utf8_lossy(label).trim_end_matches('\0').to_owned();
    if label != DATA_LABEL {
        return Content::Labelled(label);
    }
    let field = |at: usize| {
        head.get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    };
    let block_bytes = 1024u64
        .checked_shl(field(EXT_LOG_BLOCK_SIZE).min(20))
        .unwrap_or(0);
    Content::Ours {
        bytes: u64::from(field(EXT_BLOCKS_LOW)) * block_bytes,
    }
}

/// Decides what to do; only a blank disk is ever formatted, and only when the host allows it.
#[must_use]
pub fn plan(content: &Content, disk_bytes: u64, may_format: bool) -> Plan {
    let refuse = |reason, evidence: String| Plan::Refuse { reason, evidence };
    match content {
        Content::Ours { bytes } => Plan::Mount {
            grow: disk_bytes.saturating_sub(*bytes) >= EDGE_BYTES as u64,
        },
        Content::Blank if disk_bytes < 2 * EDGE_BYTES as u64 => {
            refuse("TooSmall", format!("the data disk has {disk_bytes} bytes"))
        }
        Content::Blank if may_format => Plan::Format,
        Content::Blank => refuse(
            "Blank",
            "the data disk is blank and boot.json does not allow to format it".into(),
        ),
        Content::Labelled(label) => refuse(
            "Foreign",
            format!("the data disk holds an ext file system labelled {label:?}, not {DATA_LABEL:?}"),
        ),
        Content::Foreign => refuse(
            "Foreign",
            "the data disk is neither blank nor ext4: never formatted".into(),
        ),
    }
}

/// Reads both ends of a disk and its size.
///
/// # Errors
/// The system's own.
pub fn inspect(disk: &Path) -> io::Result<(Content, u64)> {
    let mut file = File::open(disk)?;
    let bytes = file.seek(SeekFrom::End(0))?;
    let edge = usize::try_from(bytes).unwrap_or(EDGE_BYTES).min(EDGE_BYTES);
    let (mut head, mut tail) = (vec![0; edge], vec![0; edge]);
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut head)?;
    file.seek(SeekFrom::Start(bytes - edge as u64))?;
    file.read_exact(&mut tail)?;
    Ok((classify(&head, &tail), bytes))
}

/// The device with a serial number, as soon as it shows.
///
/// # Errors
/// `NotFound`, with the serials that are there.
pub(super) fn wait(serial: &str, limit: Duration) -> io::Result<PathBuf> {
    let begun = Instant::now();
    loop {
        let seen = serials(Path::new("/sys/block"))?;
        if let Some((name, _)) = seen.iter().find(|(_, found)| found == serial) {
            return Ok(Path::new("/dev").join(name));
        }
        if begun.elapsed() >= limit {
            let text = format!(
                "no disk with serial {serial:?} within {} s; there are {seen:?}",
                limit.as_secs()
            );
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        std::thread::sleep(PAUSE);
    }
}

fn serials(block: &Path) -> io::Result<Vec<(String, String)>> {
    let mut seen = Vec::new();
    for entry in fs::read_dir(block)? {
        let entry = entry?;
        if let Ok(serial) = fs::read_to_string(entry.path().join("serial")) {
            seen.push((
                entry.file_name().to_string_lossy().into_owned(),
                serial.trim_end().to_owned(),
            ));
        }
    }
    seen.sort();
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ext(label: &str, blocks: u32) -> Vec<u8> {
        let mut head = vec![0; 4096];
        head[EXT_MAGIC..EXT_MAGIC + 2].copy_from_slice(&[0x53, 0xef]);
        head[EXT_LABEL..EXT_LABEL + label.len()].copy_from_slice(label.as_bytes());
        head[EXT_BLOCKS_LOW..EXT_BLOCKS_LOW + 4].copy_from_slice(&blocks.to_le_bytes());
        head[EXT_LOG_BLOCK_SIZE] = 2;
        head
    }

    #[test]
    fn only_zeros_at_both_ends_are_blank() {
        assert_eq!(classify(&[0; 4096], &[0; 4096]), Content::Blank);
        let mut late = vec![0; 4096];
        late[4095] = 1; // such as a GPT backup header
        assert_eq!(classify(&[0; 4096], &late), Content::Foreign);
        assert_eq!(classify(&late, &[0; 4096]), Content::Foreign);
        assert_eq!(classify(&[1; 8], &[]), Content::Foreign);
    }

    #[test]
    fn a_file_system_is_ours_by_its_label() {
        assert_eq!(classify(&ext(DATA_LABEL, 256), &[]), Content::Ours { bytes: MIB });
        assert_eq!(
            classify(&ext("backup", 256), &[]),
            Content::Labelled("backup".into())
        );
    }

    #[test]
    fn nothing_but_a_blank_disk_is_formatted_and_only_when_allowed() {
        let contents = [
            Content::Blank,
            Content::Ours { bytes: 64 * MIB },
            Content::Labelled("x".into()),
            Content::Foreign,
        ];
        for content in &contents {
            for allowed in [true, false] {
                let formats = plan(content, 64 * MIB, allowed) == Plan::Format;
                assert_eq!(
                    formats,
                    *content == Content::Blank && allowed,
                    "{content:?} {allowed}"
                );
            }
        }
        assert!(matches!(
            plan(&Content::Blank, MIB, true),
            Plan::Refuse {
                reason: "TooSmall",
                ..
            }
        ));
    }

    #[test]
    fn a_larger_disk_grows_its_file_system() {
        let ours = Content::Ours { bytes: 64 * MIB };
        assert_eq!(plan(&ours, 64 * MIB + 4096, false), Plan::Mount { grow: false });
        assert_eq!(plan(&ours, 128 * MIB, false), Plan::Mount { grow: true });
        assert_eq!(plan(&ours, 32 * MIB, false), Plan::Mount { grow: false });
    }

    #[test]
    fn a_real_file_system_is_recognised() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        File::create(&disk).unwrap().set_len(16 * MIB).unwrap();
        assert_eq!(inspect(&disk).unwrap(), (Content::Blank, 16 * MIB));
        let made = std::process::Command::new("/usr/sbin/mkfs.ext4")
            .args(super::super::data::MKFS)
            .arg(&disk)
            .status();
        if made.is_ok_and(|status| status.success()) {
            assert_eq!(
                inspect(&disk).unwrap(),
                (Content::Ours { bytes: 16 * MIB }, 16 * MIB)
            );
        } else {
            eprintln!("skipped: this machine has no mkfs.ext4");
        }
    }

    #[test]
    fn disks_are_found_by_serial() {
        let directory = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "root"), ("vdb", "data\n")] {
            fs::create_dir(directory.path().join(name)).unwrap();
            fs::write(directory.path().join(name).join("serial"), serial).unwrap();
        }
        fs::create_dir(directory.path().join("loop0")).unwrap();
        let seen = serials(directory.path()).unwrap();
        assert_eq!(
            seen,
            [("vda".into(), "root".into()), ("vdb".into(), "data".into())]
        );
    }

    #[test]
    fn a_disk_is_looked_at_at_both_of_its_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        for (at, content) in [
            (None, Content::Blank),
            (Some(0), Content::Foreign),
            (Some(2 * MIB), Content::Foreign),
            (Some(3 * MIB - 1), Content::Foreign),
            (Some(MIB + 5), Content::Blank),
        ] {
            let file = File::create(&path).unwrap();
            file.set_len(3 * MIB).unwrap();
            if let Some(at) = at {
                std::os::unix::fs::FileExt::write_all_at(&file, &[1], at).unwrap();
            }
            assert_eq!(inspect(&path).unwrap(), (content, 3 * MIB), "{at:?}");
        }
        File::create(&path).unwrap().set_len(10).unwrap();
        assert_eq!(inspect(&path).unwrap(), (Content::Blank, 10));
        assert_eq!(plan(&Content::Blank, 2 * MIB, true), Plan::Format);
        assert!(matches!(
            plan(&Content::Blank, 2 * MIB - 1, true),
            Plan::Refuse {
                reason: "TooSmall",
                ..
            }
        ));
    }
}
