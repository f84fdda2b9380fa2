//! The boot record: what the host hands PID 1 in the last initramfs segment of one boot.

use serde::{Deserialize, Serialize};

use crate::handshake::{BootKey, Identity};
use crate::limits::BOOT_RECORD_BYTES;

/// Its path in the initramfs.
pub const PATH: &str = "/boot.json";
/// The serial number of the disk with the read-only root.
pub const ROOT_SERIAL: &str = "root";
/// The serial number of the disk with guest agent and modules.
pub const AGENT_SERIAL: &str = "agent";
/// The serial number of the data disk.
pub const DATA_SERIAL: &str = "data";
/// The file system label of the data disk.
pub const DATA_LABEL: &str = "sovereign-data";
/// The vsock port of the guest agent.
pub const AGENT_PORT: u32 = 1024;

/// `boot.json`: one boot of one guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootRecord {
    /// 1.
    pub version: u16,
    /// The boot id that the host assigned.
    pub boot_id: String,
    /// The key of this boot.
    pub key: BootKey,
    /// The host's wall clock when it wrote this, in nanoseconds since 1970 UTC.
    pub wall_ns: i64,
    /// Hex bytes for the kernel's entropy pool.
    pub seed: String,
    /// The vsock port on which the agent listens.
    pub port: u32,
    /// True when init may format the data disk, if it is blank.
    pub format_data: bool,
}

/// Why a boot record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BootRecordError {
    /// Larger than its limit.
    #[error("boot.json of {0} bytes is over the limit of {BOOT_RECORD_BYTES}")]
    TooLong(usize),
    /// No JSON of this shape.
    #[error("boot.json cannot be read")]
    Unreadable(#[source] serde_json::Error),
    /// Of another version.
    #[error("boot.json is of version {0}, this init reads version 1")]
    Version(u16),
}

impl BootRecord {
    /// Reads a record.
    ///
    /// # Errors
    /// [`BootRecordError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, BootRecordError> {
        if bytes.len() > BOOT_RECORD_BYTES {
            return Err(BootRecordError::TooLong(bytes.len()));
        }
        let record: Self = serde_json::from_slice(bytes).map_err(BootRecordError::Unreadable)?;
        if record.version == 1 {
            Ok(record)
        } else {
            Err(BootRecordError::Version(record.version))
        }
    }

    /// What both ends of the link must share.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity {
            boot_id: self.boot_id.clone(),
            key: self.key.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_this_version_within_its_limit_is_read() {
        let record = BootRecord {
            version: 1,
            boot_id: "b".to_owned(),
            key: BootKey::generate().unwrap(),
            wall_ns: 1,
            seed: "00".to_owned(),
            port: AGENT_PORT,
            format_data: true,
        };
        let mut bytes = serde_json::to_vec(&record).unwrap();
        bytes.resize(BOOT_RECORD_BYTES, b' ');
        assert_eq!(BootRecord::parse(&bytes).unwrap(), record);
        bytes.push(b' ');
        let error = BootRecord::parse(&bytes).unwrap_err();
        assert!(matches!(error, BootRecordError::TooLong(_)), "{error}");
        let next = serde_json::to_vec(&BootRecord { version: 2, ..record }).unwrap();
        let error = BootRecord::parse(&next).unwrap_err();
        assert!(matches!(error, BootRecordError::Version(2)), "{error}");
    }
}
