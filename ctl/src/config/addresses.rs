//! Addresses for guests that have none in the file. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use sovereign_protocol::name::Name;
use sovereign_protocol::subnet::HostAddress;

/// An address for `guest` in the host's subnet that is not in `taken`; `None` when the subnet is full or not IPv4.
///
/// It depends on the guest's name first, so that another guest in the file moves nobody.
pub(super) fn choose(host: HostAddress, guest: &Name, taken: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let IpAddr::V4(network) = host.subnet().network() else {
        return None;
    };
    let size = 1u32 << (32 - host.prefix());
    let start = hash(guest.as_str()) % size;
    let candidates = (0..size).map(|step| Ipv4Addr::from(u32::from(network) | ((start + step) % size)));
    candidates
        .map(IpAddr::V4)
        .find(|ip| host.subnet().host(*ip).is_ok() && *ip != host.ip() && !taken.contains(ip))
}

/// FNV-1a: any function that spreads short names, the same for ever.
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hosts_of_the_subnet_and_do_not_move() {
        let host = HostAddress::parse("192.168.100.1/24").unwrap();
        let sql = Name::parse("sql").unwrap();
        let first = choose(host, &sql, &BTreeSet::new()).unwrap();
        assert_eq!(
            first.to_string(),
            "192.168.100.127",
            "changing it moves everybody's guests"
        );
        let next = choose(host, &sql, &BTreeSet::from([first])).unwrap();
        assert_eq!(next.to_string(), "192.168.100.128");
    }

    #[test]
    fn a_full_subnet_has_none() {
        let host = HostAddress::parse("10.0.0.1/30").unwrap();
        let sql = Name::parse("sql").unwrap();
        let only = choose(host, &sql, &BTreeSet::new()).unwrap();
        assert_eq!(only.to_string(), "10.0.0.2");
        assert_eq!(choose(host, &sql, &BTreeSet::from([only])), None);
    }
}
