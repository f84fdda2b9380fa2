//! What a guest's agent is told to keep true, out of what the host was asked for. Pure.

use std::collections::BTreeMap;

use sovereign_protocol::interface::InterfaceSpec;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{Exposed, GuestConfig, GuestSpec, VERSION};
use sovereign_protocol::ways::{self, Ways};

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

/// A document as an agent reads it that announced `capabilities`: older ones refuse keys that they do not know.
///
/// # Errors
/// When it is no document.
pub(crate) fn understood(document: Vec<u8>, capabilities: &[String]) -> serde_json::Result<Vec<u8>> {
    if capabilities.iter().any(|known| known == ways::CAPABILITY) {
        return Ok(document);
    }
    let mut spec: GuestSpec = serde_json::from_slice(&document)?;
    if let Some(interface) = &mut spec.interface {
        interface.ways = Ways::default();
        interface.search.clear();
        interface.gateways.truncate(1);
    }
    serde_json::to_vec(&spec)
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

    #[test]
    fn an_older_guest_agent_is_told_only_what_it_knows() {
        let text = r#"{"version":1,"revision":1,"hostname":"sql","services":[],"secrets":{"a":"s3cret"},
            "interface":{"addresses":["10.0.0.2/24","fd00::2/64"],"gateway":["10.0.0.1","fd00::1"],
            "search":["home.arpa"],"ways":{"v4":7}}}"#;
        let spec = GuestSpec::parse(text.as_bytes()).unwrap();
        let written = serde_json::to_vec(&spec).unwrap();
        let knows = |what: &[&str]| {
            let what: Vec<String> = what.iter().map(|text| (*text).to_owned()).collect();
            understood(written.clone(), &what).unwrap()
        };
        assert_eq!(knows(&["other", "ways"]), written);
        let older = knows(&["other"]);
        let text = String::from_utf8_lossy(&older).into_owned();
        assert!(!text.contains("ways") && !text.contains("search"), "{text}");
        assert!(text.contains(r#""gateway":"10.0.0.1""#), "{text}");
        let mut without = spec;
        let interface = without.interface.as_mut().unwrap();
        interface.ways = Ways::default();
        interface.search.clear();
        interface.gateways.truncate(1);
        assert_eq!(
            GuestSpec::parse(&older).unwrap(),
            without,
            "all else is as it was"
        );
    }
}
