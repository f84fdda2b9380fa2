//! PID 1 of a guest.

fn main() {
    if std::process::id() != 1 {
        sovereign_guest_agent::log::line("sovereign-init is PID 1 of a guest and nothing else", &[]);
        std::process::exit(2);
    }
    sovereign_guest_agent::init::run();
}
