// Package qemu runs guests as QEMU processes, without libvirt: it defines,
// starts, adopts, stops and moves them.
//
// A Driver owns the guests of one host. Each is a process of its own that
// outlives the agent: New followed by Adopt finds those that run, and Close
// lets them go on. A guest is defined in a YAML file (Definition), its RAM is
// one shared memory file, and how it ended is recorded exactly (End).
//
// For live migration the driver is both ends of package migrate: Driver.Source
// gives a migrate.Guest, and Driver itself is a migrate.Host whose Prepare
// makes a migrate.Shell. An agent that was restarted in the middle of a
// migration finds its guest again as a suspended one (Source, then Resume or
// Release) or as a shell (ShellOf).
//
// On disk, for each guest:
//
//	<state>/guests/NAME/definition.yaml  what it is
//	<state>/guests/NAME/record.json      how it was started, how it ended
//	<state>/guests/NAME/qemu.log         QEMU's own words
//	<state>/guests/NAME/console.log      its serial console
//	<run>/guests/NAME/process.json       PID, start time and boot
//	<run>/guests/NAME/suspension.json    settings to be put back after a migration
//	<run>/guests/NAME/resumed            a shell was told to run
//	<run>/guests/NAME/qmp.sock           QMP for the agent
//	<run>/guests/NAME/observer.sock      QMP for people and tests
//	<run>/guests/NAME/console.sock       its serial console
//	<memory>/UUID.ram                    its RAM
package qemu
