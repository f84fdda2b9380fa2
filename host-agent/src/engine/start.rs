//! A guest is started or found running: its shim, and the card that its VMM gets.

use std::os::fd::OwnedFd;
use std::path::Path;

use sovereign_protocol::name::Name;
use sovereign_protocol::spec::GuestConfig;

use super::Engine;
use crate::core::Event;
use crate::guest;
use crate::net::{TapError, names};
use crate::shim::contract::{Card, Paths, SHIM_CONFIG, ShimConfig};

/// Shims that answer in the run directory.
pub(super) fn running_shims(run: &Path) -> Vec<ShimConfig> {
    let entries = std::fs::read_dir(run).into_iter().flatten().flatten();
    entries.filter_map(|entry| running_shim(&entry.path())).collect()
}

/// The shim of a guest's run directory, if it answers.
fn running_shim(dir: &Path) -> Option<ShimConfig> {
    let bytes = std::fs::read(dir.join(SHIM_CONFIG)).ok()?;
    let shim: ShimConfig = serde_json::from_slice(&bytes).ok()?;
    let answers = std::os::unix::net::UnixStream::connect(shim.paths.shim()).is_ok();
    answers.then_some(shim)
}

impl Engine {
    /// Waits for nothing: a TAP that somebody holds is waited for by the guest's own task.
    pub(super) async fn start(&mut self, name: Name, config: &GuestConfig) {
        let (card, tap) = self.card(&name, config);
        let wanted = match self.document(&name, config) {
            Ok(wanted) => wanted,
            Err(error) => {
                let record = guest::start_failed(&error);
                return self.report(Event::Ended(name, record)).await; // else nobody would ever see its end
            }
        };
        let shim = ShimConfig {
            card,
            paths: Paths::of(&self.layout, &name),
            guest: name.clone(),
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
            data_mib: config.data_mib,
            image: config.image.clone(),
        };
        let handle = guest::start(shim, tap, wanted, self.events.clone());
        self.guests.insert(name, handle);
    }

    /// The card of a guest that is about to boot, with what opens its TAP, or of one that runs already.
    fn card(
        &mut self,
        name: &Name,
        config: &GuestConfig,
    ) -> (
        Option<Card>,
        Option<impl Future<Output = Result<OwnedFd, TapError>> + Send + use<>>,
    ) {
        let runs = running_shim(&self.layout.guest_run(name));
        let (card, tap) = match (runs, &self.network) {
            (Some(shim), _) => (shim.card, None),
            (None, Some(open)) if config.interface.is_some() => {
                let mac = names::guest_mac(&self.layout.instance, name);
                let mtu = open.wanted.borrow().mtu;
                (Some(Card { mac, mtu }), Some(open.network.open_tap(name)))
            }
            (None, _) => (None, None),
        };
        match &card {
            Some(_) => self.cards.insert(name.clone()),
            None => self.cards.remove(name),
        };
        (card, tap)
    }
}
