//! What a guest's agent is told to keep true, out of what the host was asked for. Pure.

use std::collections::BTreeMap;

use sovereign_protocol::interface::InterfaceSpec;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{Exposed, GuestConfig, GuestSpec, VERSION};

use crate::core::Ties;

/// The document for a guest; without a card there is no interface.
pub(crate) fn guest_spec(
    name: &Name,
    config: &GuestConfig,
    ties: Ties,
    revision: u64,
    secrets: BTreeMap<String, Exposed>,
    interface: Option<InterfaceSpec>,
) -> GuestSpec {
    GuestSpec {
        version: VERSION,
        revision,
        hostname: name.clone(),
        services: config.services.clone(),
        secrets,
        interface,
        tailscale: config.tailscale.clone(),
        requirements: ties.requirements,
        clients: ties.clients,
        open: config.open(),
    }
}

/// Whether a guest has to be told of the change; forwards, memory and restarts are the host's alone.
pub(crate) fn concerns_guest(name: &Name, old: &GuestConfig, new: &GuestConfig) -> bool {
    let told = |config: &GuestConfig| {
        let interface = config.interface.clone();
        guest_spec(name, config, Ties::default(), 0, BTreeMap::new(), interface)
    };
    told(old) != told(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_protocol::spec::HostSpec;

    #[test]
    fn all_that_was_asked_for_a_guest_reaches_it_and_an_interface_only_with_a_card() {
        let document = r#"{"version":1,"network":{"namespace":"auto","address":"10.0.0.1/24"},"guests":{"sql":{
            "memory_mib":256,"vcpus":1,"data_mib":64,
            "image":{"kernel":"k","initramfs":"i","root":"r","agent":"a","digest":"d"},
            "services":[{"name":"pg","kind":{"postgres":{"settings":{},"port":5432}},"limits":{"pids_max":99}}],
            "forwards":[],"interface":{"addresses":["10.0.0.2/24"]},"tailscale":{}}}}"#;
        let spec = HostSpec::parse(document.as_bytes()).unwrap();
        let (name, config) = spec.guests.iter().next().unwrap();
        let told = |interface| guest_spec(name, config, Ties::default(), 7, BTreeMap::new(), interface);
        let all = told(config.interface.clone());
        assert_eq!((all.version, all.revision, &all.hostname), (VERSION, 7, name));
        assert_eq!(all.services[0].limits.as_ref().unwrap().pids_max, Some(99));
        assert_eq!(all.interface, config.interface);
        assert!(all.interface.is_some() && all.tailscale.is_some());
        assert_eq!(told(None).interface, None);
    }
}
