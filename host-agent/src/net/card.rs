//! A guest's network card on QEMU's command line, as a pure value.

use std::ffi::OsString;

use super::names::Mac;
use super::wanted::DEFAULT_MTU;

/// The arguments for a card on a TAP whose descriptor QEMU inherits under this number.
///
/// No vhost: /dev/vhost-net is not there for everybody, and packets are few. No boot ROM: it is
/// a package of its own on some systems, and nobody boots from this card.
#[must_use]
pub fn arguments(tap: i32, mac: Mac, mtu: u32) -> Vec<OsString> {
    let mut device = format!("virtio-net-pci,netdev=net,mac={mac},romfile=");
    if mtu != DEFAULT_MTU {
        device.push_str(&format!(",host_mtu={mtu}")); // the guest's driver takes it over
    }
    let netdev = format!("tap,id=net,fd={tap},vhost=off");
    ["-netdev", &netdev, "-device", &device]
        .map(OsString::from)
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_for_a_card() {
        let words = |mtu| arguments(7, Mac([2, 0, 0, 0, 0, 0x1f]), mtu).join(&OsString::from(" "));
        assert_eq!(
            words(1500),
            "-netdev tap,id=net,fd=7,vhost=off -device virtio-net-pci,netdev=net,mac=02:00:00:00:00:1f,romfile="
        );
        assert!(words(1400).to_string_lossy().ends_with(",romfile=,host_mtu=1400"));
    }
}
