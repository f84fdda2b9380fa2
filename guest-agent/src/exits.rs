//! The exit statuses that PID 1 reaped: the last 64 records of 16 bytes, oldest first.
//!
//! An agent that was restarted is not the parent of its services any more, so it learns
//! here how one ended.

use std::collections::VecDeque;

/// Records that are kept.
pub const RECORDS: usize = 64;
const BYTES: usize = 16;

/// One reaped process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The process.
    pub pid: u32,
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// Milliseconds since boot.
    pub at_ms: u64,
}

impl Exit {
    /// How it ended, in words.
    #[must_use]
    pub fn describe(&self) -> String {
        match self.status.checked_sub(128) {
            Some(signal @ 1..=64) => format!("signal {signal}"),
            _ => format!("exit status {}", self.status),
        }
    }
}

/// The last exits.
#[derive(Debug, Default)]
pub struct Exits(VecDeque<Exit>);

impl Exits {
    /// Adds one and forgets the oldest over [`RECORDS`].
    pub fn push(&mut self, exit: Exit) {
        self.0.push_back(exit);
        if self.0.len() > RECORDS {
            self.0.pop_front();
        }
    }

    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let record = |exit: &Exit| {
            let mut bytes = [0; BYTES];
            bytes[..4].copy_from_slice(&exit.pid.to_le_bytes());
            bytes[4..8].copy_from_slice(&exit.status.to_le_bytes());
            bytes[8..].copy_from_slice(&exit.at_ms.to_le_bytes());
            bytes
        };
        self.0.iter().flat_map(record).collect()
    }
}

/// The newest record of a process in the file's bytes.
#[must_use]
pub fn find(file: &[u8], pid: u32) -> Option<Exit> {
    let (records, _) = file.as_chunks::<BYTES>();
    records.iter().rev().map(decode).find(|exit| exit.pid == pid)
}

fn decode(record: &[u8; BYTES]) -> Exit {
    let [a, b, c, d, e, f, g, h, at @ ..] = *record;
    Exit {
        pid: u32::from_le_bytes([a, b, c, d]),
        status: u32::from_le_bytes([e, f, g, h]),
        at_ms: u64::from_le_bytes(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_record_of_a_pid_is_found_and_old_ones_are_forgotten() {
        let mut exits = Exits::default();
        for n in 0..70u32 {
            exits.push(Exit {
                pid: 100 + n % 66,
                status: n,
                at_ms: u64::from(n) << 33,
            });
        }
        let file = exits.encode();
        assert_eq!(file.len(), RECORDS * 16);
        assert_eq!(
            find(&file, 101),
            Some(Exit {
                pid: 101,
                status: 67,
                at_ms: 67 << 33
            })
        );
        assert_eq!(find(&file, 105).map(|e| e.status), None);
        assert_eq!(find(&file[..5], 105), None);
    }

    #[test]
    fn a_status_reads_as_code_or_signal() {
        let of = |status| {
            let (pid, at_ms) = (1, 0);
            Exit { pid, status, at_ms }.describe()
        };
        assert_eq!(
            [of(0), of(127), of(128), of(137), of(255)],
            [
                "exit status 0",
                "exit status 127",
                "exit status 128",
                "signal 9",
                "exit status 255"
            ]
        );
    }
}
