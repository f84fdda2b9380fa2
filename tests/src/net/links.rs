//! The links that [`WANT`] means, and an independent look at each of them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use sovereign_host_agent::net::names;
use sovereign_protocol::name::Name;

use super::{User, World};

/// One bridge and two guests.
pub const WANT: &str = "want 192.168.100.1/24 1500 sql web";

/// The names that a world's instance gives to them.
#[derive(Debug)]
pub struct Links {
    /// The bridge.
    pub bridge: String,
    /// The TAP of `sql`.
    pub sql: String,
    /// The TAP of `web`.
    pub web: String,
    /// The device group of all three.
    pub group: String,
}

/// A world with a tun node for everybody, and the names of its links.
///
/// # Errors
/// The system's own.
pub fn world(agent: &str, user: User) -> Result<(World, Links)> {
    let world = World::new(Path::new(agent), user, "666")?;
    let instance = Name::parse(world.instance())?;
    let tap = |guest: &str| Ok::<_, anyhow::Error>(names::tap(&instance, &Name::parse(guest)?).to_string());
    let links = Links {
        bridge: names::bridge(&instance).to_string(),
        sql: tap("sql")?,
        web: tap("web")?,
        group: names::Mark::of(&instance).group.to_string(),
    };
    Ok((world, links))
}

impl Links {
    /// Whether everything is there as [`WANT`] says.
    ///
    /// # Errors
    /// The first thing that is not.
    pub fn as_wanted(&self, world: &World) -> Result<()> {
        let seen = world.picture()?;
        let bridge = seen.link(&self.bridge).context("no bridge")?;
        ensure!(bridge["kind"] == "bridge", "{bridge:#}");
        ensure!(bridge["group"] == self.group.as_str(), "{bridge:#}");
        ensure!(bridge["up"] == true, "{bridge:#}");
        let addresses = seen.addresses(&self.bridge);
        ensure!(addresses.iter().any(|a| a == "192.168.100.1/24"), "{addresses:?}");
        let routes = seen.routes(&self.bridge);
        ensure!(routes.contains(&"192.168.100.0/24"), "{routes:?}");
        for name in [&self.sql, &self.web] {
            let tap = seen.link(name).with_context(|| format!("no {name}"))?;
            for (key, value) in [("persist", true), ("vnet_hdr", true), ("pi", false)] {
                ensure!(tap["tun"][key] == value, "{key}: {tap:#}");
            }
            ensure!(tap["tun"]["type"] == "tap", "{tap:#}");
            ensure!(tap["master"] == self.bridge.as_str(), "{tap:#}");
            ensure!(tap["group"] == self.group.as_str(), "{tap:#}");
            ensure!(tap["up"] == true, "{tap:#}");
        }
        let lo = seen.link("lo").context("no lo")?;
        ensure!(lo["up"] == true, "{lo:#}");
        Ok(())
    }
}
