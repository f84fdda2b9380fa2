//! `plan`: what `up` would change; changes nothing itself.

use serde_json::json;
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{HostSpec, Namespace};
use sovereign_protocol::status::Phase;
use sovereign_reconcile::view::NetworkMode;

use crate::agent::{self, Binaries};
use crate::context::{Context, data};
use crate::error::{CommandError, Kind};
use crate::link::Link;
use crate::plan::{Found, FoundNetwork, Step, network_spec, plan};
use crate::{cli, config, image, look, shims};

pub(super) async fn run(context: &Context, args: &cli::Plan) -> Result<(), CommandError> {
    show(context, args.name.as_ref()).await
}

/// Prints the plan of `up`, or of `up NAME`.
///
/// # Errors
/// Those of reading the configuration, the cache and the running agent.
pub(super) async fn show(context: &Context, only: Option<&Name>) -> Result<(), CommandError> {
    let settings = config::load(context)?;
    let names = super::up::wanted(&settings, only)?;
    let binaries = Binaries::find()?;
    let (images, missing) = image::find(context, &settings, &binaries)?;
    let mut found = find(context, &binaries).await?;
    found.image = missing.is_empty();
    let all = settings.host_spec(&images, None);
    let stays = settings.with_required(&found.running.union(&names).cloned().collect());
    let wanted = match only {
        None => all,
        // The other guests of the file stay as they are.
        Some(_) => HostSpec {
            guests: all
                .guests
                .into_iter()
                .filter(|(name, _)| stays.contains(name))
                .collect(),
            ..all
        },
    };
    if nobody_looks(&found, &wanted) {
        let spec = network_spec(&wanted, |_| false);
        found.network = FoundNetwork::Looked(look::look(context, &binaries, Some(&spec)).await?);
    }
    let steps = plan(&context.layout.instance, &wanted, &missing, &found).map_err(|error| {
        CommandError::new(Kind::Configuration, "BadNetwork", "no network can be made of it").because(error)
    })?;
    told(context, &steps, "sovereign up")
}

/// Prints the steps of what `next` would do.
pub(super) fn told(context: &Context, steps: &[Step], next: &str) -> Result<(), CommandError> {
    if context.json {
        let evidence = format!("{} steps", steps.len());
        let reason = if steps.is_empty() {
            "NothingToDo"
        } else {
            "Planned"
        };
        return context.done_with(reason, &evidence, next, &[("steps", json!(steps))]);
    }
    if steps.is_empty() {
        return data("nothing to do");
    }
    steps.iter().try_for_each(|step| data(&step.to_string()))
}

/// Whether a network is to be made in this namespace, and no host agent sees what is there.
fn nobody_looks(found: &Found, wanted: &HostSpec) -> bool {
    let here = wanted.network.as_ref().map(|network| network.namespace) == Some(Namespace::Host);
    let unseen = match &found.network {
        FoundNetwork::Absent => true,
        FoundNetwork::Seen(view) => !view.mode.is_there(),
        FoundNetwork::Hidden | FoundNetwork::Looked(_) => false,
    };
    here && unseen
}

async fn find(context: &Context, binaries: &Binaries) -> Result<Found, CommandError> {
    let layout = &context.layout;
    let mut found = Found::default();
    let guests = std::fs::read_dir(layout.state.join("guests"))
        .into_iter()
        .flatten()
        .flatten();
    let names = guests.filter_map(|entry| Name::parse(entry.file_name().to_str()?).ok());
    found.disks = names.filter(|name| layout.data_disk(name).exists()).collect();
    match Link::connect_if_running(layout).await? {
        Some(link) => {
            found.agent = true;
            found.outdated = agent::is_outdated(layout, binaries, &link).await;
            found.spec = link.wanted().await?;
            let guests = link.status().await?.guests.into_iter();
            let runs = guests.filter(|guest| !matches!(guest.phase, Phase::Stopped | Phase::Stopping));
            found.running = runs.map(|guest| guest.name).collect();
            // The last call: an agent of another build may not know it, and cuts the connection.
            let told = match link.network().await {
                Err(_) if found.outdated => None,
                told => told?,
            };
            found.network = match told {
                // A fresh agent has not yet found what the last one left.
                Some(view) if view.mode == NetworkMode::Undecided && helper_answers(layout) => {
                    FoundNetwork::Hidden
                }
                Some(view) => FoundNetwork::Seen(view),
                None => FoundNetwork::Hidden,
            };
        }
        None => {
            if helper_answers(layout) {
                found.network = FoundNetwork::Hidden;
            }
            found.running = shims::running(layout);
        }
    }
    Ok(found)
}

/// True when somebody holds the private network of this instance; it outlives host agents.
fn helper_answers(layout: &Layout) -> bool {
    std::os::unix::net::UnixStream::connect(layout.netns()).is_ok()
}
