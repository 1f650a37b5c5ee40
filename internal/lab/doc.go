// Package lab makes a cluster of hosts on one machine: each host is a network
// namespace with a bridge and an uplink to a switch, which is a bridge in a
// namespace of its own; beside them is a namespace for clients. Each host has
// folders of its own for its agent, and a tmpfs for the memory of its guests;
// one storage folder is seen by all.
//
// Hosts may have a libvirtd each, with mounts of their own over the places where
// libvirt keeps things. Then guests are domains, which package domain writes.
//
// A lab is in one state folder and in its namespaces, and nowhere else: nothing
// of it is ever in the machine's own network namespace. Up makes it, Open finds
// it again, Down removes all of it, also what a crash has left.
package lab
