// Package libvirt drives the domains of a host's libvirtd: it lists, watches,
// starts, stops and moves them, as they are.
//
// A Driver is to libvirt domains what package qemu's is to guests of lmctl's
// own. Domains belong to libvirt and are its to keep: they come and go by other
// hands, and what another hand does is seen by libvirt's events and respected.
//
// # A migration
//
// The driver makes the five calls of a managed migration itself (Begin3,
// Prepare3, Perform3, Finish3, Confirm3), each on the libvirtd of its own host;
// the engine in package migrate carries between the hosts what libvirt's client
// would. In between, the engine copies the memory: the domain's RAM lies in
// shared files, and QEMU's capability x-ignore-shared leaves it out of the
// stream.
//
//	source                               destination
//	Definition  Begin3
//	                                     Prepare     Prepare3: a QEMU that waits
//	(passes)
//	Suspend     Perform3 into our socket
//	SaveState   (its stream's end)       LoadState   Finish3, the domain paused
//	(commit)
//	                                     Resume      the domain's CPUs start
//	Release     Confirm3, ended
//	Resume      Confirm3, cancelled      Destroy     Finish3, cancelled
//
// In relay mode QEMU copies the memory itself: Relay calls Perform3 before the
// passes, Suspend has QEMU stop the guest by allowing it any downtime, and
// LoadState begins with the first pass. QEMU's return path is passed on too.
//
// Finish3 is called with the domain to stay paused, and before the state is
// there, so that it waits for it: when it returns, the domain is an ordinary one
// that stands still, and survives the agent and libvirtd. The CPUs start by a
// call of their own, after the commit.
//
// From the call that starts its CPUs on, a domain is this host's guest, whatever
// becomes of it, and what is left is to define it here (arrival.go). A shell is
// known by its process: another QEMU of the same domain is another hand's.
//
// QEMU's streams go through unix sockets of the driver's own, in a folder that
// QEMU's user alone can use, and the source's is accepted from the domain's
// process alone.
//
// On disk, for each domain in a migration:
//
//	<run>/libvirt/UUID/suspension.json  it was suspended; what to put back
//	<run>/libvirt/UUID/shell.json       it is on its way here
//	<run>/libvirt/UUID/resumed          it was told to run here
//	<run>/libvirt/UUID/stream/          the sockets
package libvirt
