//! Who has a TCP port: for the message when a forward cannot have it. Reads /proc only.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// The programs that listen on, or are bound to, what `wanted` would need.
///
/// Other users' processes can be seen by root only; then the user's id is all there is.
#[must_use]
pub fn describe(wanted: SocketAddr) -> String {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    let Some(socket) = tables
        .iter()
        .flat_map(|table| table.lines())
        .filter_map(parse)
        .find(|s| s.blocks(wanted))
    else {
        return "bound by a socket that is not in /proc/net/tcp".to_owned();
    };
    match holder(Path::new("/proc"), socket.inode) {
        Some((pid, program)) => format!("pid {pid} ({program}) has it"),
        None => format!("a process of user {} has it", socket.uid),
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Socket {
    local: SocketAddr,
    listens: bool,
    uid: u32,
    inode: u64,
}

impl Socket {
    /// A wildcard address takes the port of every address.
    fn blocks(&self, wanted: SocketAddr) -> bool {
        let ip = self.local.ip();
        self.listens
            && self.local.port() == wanted.port()
            && (ip == wanted.ip() || ip.is_unspecified() || wanted.ip().is_unspecified())
    }
}

/// A line of /proc/net/tcp or tcp6 (proc_pid_net(5)): addresses are hexadecimal words of the host's byte order.
fn parse(line: &str) -> Option<Socket> {
    const LISTEN: &str = "0A";
    let words: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = words.get(1)?.split_once(':')?;
    let mut bytes = Vec::with_capacity(16);
    for word in address.as_bytes().chunks(8) {
        let word = std::str::from_utf8(word).ok().filter(|word| word.len() == 8)?;
        let word = u32::from_str_radix(word, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
        _ => return None,
    };
    Some(Socket {
        local: SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?),
        listens: *words.get(3)? == LISTEN,
        uid: words.get(7)?.parse().ok()?,
        inode: words.get(9)?.parse().ok()?,
    })
}

/// The process that holds a socket, and its program's name.
fn holder(proc: &Path, inode: u64) -> Option<(u32, String)> {
    let wanted = format!("socket:[{inode}]");
    let pids = fs::read_dir(proc).ok()?.flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .find_map(|pid| {
            let process = proc.join(pid.to_string());
            let mut files = fs::read_dir(process.join("fd")).ok()?.flatten();
            files
                .find(|file| fs::read_link(file.path()).is_ok_and(|to| to.as_os_str() == wanted.as_str()))?;
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            Some((pid, name.trim().to_owned()))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_that_has_a_port_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let ours = format!("pid {} (", std::process::id());
        assert!(describe(address).starts_with(&ours), "{}", describe(address));
        let any = SocketAddr::from(([0, 0, 0, 0], address.port()));
        assert!(describe(any).starts_with(&ours), "a wildcard needs it too");
        drop(listener);
        assert!(!describe(address).starts_with(&ours));
    }

    #[test]
    fn lines_of_both_tables_are_read_and_nonsense_is_not() {
        let v4 = "   0: 0100007F:3C48 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 77 1 x";
        let socket = parse(v4).unwrap();
        assert_eq!(
            (socket.local, socket.uid, socket.inode),
            ("127.0.0.1:15432".parse().unwrap(), 1000, 77)
        );
        let v6 = "   1: 00000000000000000000000000000000:3C48 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 78 1";
        assert!(parse(v6).unwrap().blocks("127.0.0.1:15432".parse().unwrap()));
        assert!(!parse(v4).unwrap().blocks("127.0.0.2:15432".parse().unwrap()));
        for line in [
            "",
            "sl local_address",
            "0: zz:1 x 0A",
            "0: 01:1 0 0A 0 0 0 0 0 0",
            "0: ééé:1 0 0A 0 0 0 0 0 0",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
