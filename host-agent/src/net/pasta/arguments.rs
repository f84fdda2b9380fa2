//! How pasta is called. Pure.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use sovereign_reconcile::names::LinkName;
use sovereign_reconcile::resolver::{FORWARDER_V4, FORWARDER_V6};

/// What is run.
const PROGRAM: &str = "pasta";
/// Of 192.0.0.0/29, which no network has but between a host and its own translator (RFC 7335); the forwarder is the third.
const ADDRESS_V4: &str = "192.0.0.2";
const GATEWAY_V4: &str = "192.0.0.1";
const PREFIX_V4: &str = "29";
/// Of a unique local network of our own (RFC 4193), whose global id was drawn once.
const ADDRESS_V6: &str = "fdc0:5d1e:7a93::2";
const GATEWAY_V6: &str = "fdc0:5d1e:7a93::1";
/// Of its end of the link, as newer ones have it by themselves; older ones take that of the machine's way out and do not
/// start where it has none (WireGuard, PPP, cellular).
const MAC: &str = "9a:55:9a:55:9a:55";
/// What guests have; pasta carries streams and datagrams, not packets, so a smaller one outside is its own business.
const MTU: &str = "1500";

/// No port of the namespace is bound outside, no port of the machine is shown inside, and the gateway's address does not
/// mean the machine: pasta's own defaults do all three.
const CLOSED: [&str; 9] = [
    "-t",
    "none",
    "-u",
    "none",
    "-T",
    "none",
    "-U",
    "none",
    "--no-map-gw",
];

/// The words after the program: the namespace is standard input, the user namespace that owns it standard output, because
/// neither needs a process that can be looked at then. `root` keeps the user: that which pasta would take instead may not
/// enter the namespace.
pub(super) fn arguments(
    link: &LinkName,
    in_user_namespace: bool,
    root: bool,
    resolvers: &BTreeSet<IpAddr>,
) -> Vec<String> {
    let mut words = vec!["--foreground", "--quiet", "--config-net", "--no-netns-quit"];
    words.extend(CLOSED);
    words.extend([
        "--no-dhcp",
        "--no-dhcpv6",
        "--no-ra",
        "--ns-ifname",
        link.as_str(),
    ]);
    words.extend(["-a", ADDRESS_V4, "-n", PREFIX_V4, "-g", GATEWAY_V4]);
    words.extend(["-a", ADDRESS_V6, "-g", GATEWAY_V6, "-M", MAC, "-m", MTU]);
    let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
    let forwarders = [IpAddr::V4(FORWARDER_V4), IpAddr::V6(FORWARDER_V6)];
    for forwarder in forwarders {
        if resolvers.iter().any(|own| own.is_ipv4() == forwarder.is_ipv4()) {
            words.extend(["--dns-forward".to_owned(), forwarder.to_string()]);
        }
    }
    if root {
        words.extend(["--runas", "0:0"].map(str::to_owned));
    }
    if in_user_namespace {
        words.extend(["--userns", "/proc/self/fd/1"].map(str::to_owned));
    }
    words.extend(["--netns", "/proc/self/fd/0"].map(str::to_owned));
    words
}

/// Where the program is, by the directories of `PATH`.
pub(super) fn find(path: Option<OsString>) -> Option<PathBuf> {
    let path = path?;
    let mut places = std::env::split_paths(&path).filter(|directory| directory.is_absolute());
    places.find_map(|directory| Some(directory.join(PROGRAM)).filter(|program| program.is_file()))
}

/// The last thing that pasta said of itself; lines about a missing system log are none.
pub(super) fn last_line(said: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(said);
    let lines = text.lines().map(str::trim);
    let mut telling = lines.filter(|line| !line.is_empty() && !line.starts_with("Failed to send"));
    telling.next_back().map(|line| line.chars().take(300).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(user: bool, root: bool, resolvers: &[&str]) -> String {
        let link = LinkName::parse("sv5pkj_pasta").unwrap();
        let resolvers = resolvers.iter().map(|ip| ip.parse().unwrap()).collect();
        arguments(&link, user, root, &resolvers).join(" ")
    }

    #[test]
    fn nothing_is_open_to_either_side() {
        for (user, root) in [(false, true), (true, false)] {
            let said = words(user, root, &[]);
            for closed in ["-t none", "-u none", "-T none", "-U none", "--no-map-gw"] {
                assert!(said.contains(closed), "{closed}: {said}");
            }
            assert!(!said.contains("--dns-forward"), "{said}");
            assert!(said.ends_with("--netns /proc/self/fd/0"), "{said}");
            assert_eq!(said.contains("--userns /proc/self/fd/1"), user, "{said}");
            assert_eq!(said.contains("--runas 0:0"), root, "{said}");
        }
    }

    #[test]
    fn a_resolver_on_the_loopback_is_asked_by_an_address_of_the_same_family() {
        let four = words(false, true, &["127.0.0.53", "127.0.0.1"]);
        assert_eq!(four.matches("--dns-forward").count(), 1, "{four}");
        assert!(four.contains("--dns-forward 192.0.0.3"), "{four}");
        let six = words(false, true, &["::1"]);
        assert!(six.contains("--dns-forward fdc0:5d1e:7a93::3"), "{six}");
    }

    #[test]
    fn the_program_is_looked_for_in_absolute_directories_only() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find(None), None);
        let path = std::env::join_paths(["relative".as_ref(), dir.path()]).unwrap();
        assert_eq!(find(Some(path.clone())), None);
        std::fs::write(dir.path().join("pasta"), "").unwrap();
        assert_eq!(find(Some(path)), Some(dir.path().join("pasta")));
    }

    #[test]
    fn the_last_telling_line_is_the_evidence() {
        let said = b"Failed to send 57 bytes to syslog\nCouldn't open network namespace x\n\nFailed to send 3 bytes\n";
        assert_eq!(last_line(said).unwrap(), "Couldn't open network namespace x");
        assert_eq!(last_line(b"\n \n"), None);
        assert_eq!(last_line(&[b'\xff'; 900]).unwrap().chars().count(), 300);
    }
}
