//! Addresses for guests that have none in the file. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sovereign_protocol::name::Name;
use sovereign_protocol::subnet::HostAddress;

/// Addresses of a subnet that are tried at most, in bits; more guests than that do not fit on a bridge.
const TRIED_BITS: u32 = 32;

/// An address for `guest` in the host's subnet that is not in `taken`; `None` when the subnet is full.
///
/// It depends on the guest's name first, so that another guest in the file moves nobody.
pub(super) fn choose(host: HostAddress, guest: &Name, taken: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let network = host.subnet().network();
    let bits = if network.is_ipv4() { 32 } else { 128 };
    let size = 1u64 << (bits - u32::from(host.prefix())).min(TRIED_BITS);
    let start = u64::from(hash(guest.as_str())) % size;
    let candidates = (0..size)
        .map(|step| (start + step) % size)
        .map(|number| match network {
            IpAddr::V4(network) => {
                let number = u32::try_from(number).unwrap_or(u32::MAX);
                IpAddr::V4(Ipv4Addr::from(u32::from(network) | number))
            }
            IpAddr::V6(network) => IpAddr::V6(Ipv6Addr::from(u128::from(network) | u128::from(number))),
        });
    { candidates }.find(|ip| host.subnet().host(*ip).is_ok() && *ip != host.ip() && !taken.contains(ip))
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
    fn an_address_of_ipv6_depends_on_the_name_as_well() {
        let host = HostAddress::parse("fd00:64::1/64").unwrap();
        let sql = Name::parse("sql").unwrap();
        let first = choose(host, &sql, &BTreeSet::new()).unwrap();
        assert_eq!(
            first.to_string(),
            "fd00:64::be45:f7f",
            "changing it moves everybody's guests"
        );
        let next = choose(host, &sql, &BTreeSet::from([first])).unwrap();
        assert_eq!(next.to_string(), "fd00:64::be45:f80");
        let small = HostAddress::parse("fd00:64::1/126").unwrap();
        let taken = BTreeSet::from(["fd00:64::2".parse().unwrap(), "fd00:64::3".parse().unwrap()]);
        assert_eq!(choose(small, &sql, &taken), None);
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
