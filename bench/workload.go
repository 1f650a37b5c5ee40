package bench

import (
	"slices"

	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/lab"
)

// Workload is a guest with something to do.
type Workload struct {
	Name   string
	Title  string
	Memory int64 // bytes
	// Idle says that the guest writes next to nothing: a move of it is to be
	// compared with what QEMU itself needs.
	Idle bool
	// Target is what lmctl's downtime is to be at most, as a part of that of
	// virsh migrate --live; 0 for none.
	Target float64
	// Family groups workloads that differ in their memory only.
	Family string

	program program
}

const mib = 1 << 20

// Smallest is the workload that takes the least time.
const Smallest = "small-writer"

// writerPages is what the unbounded writer dirties again and again: 99 MiB.
const writerPages = 25344

// Workloads are all there are for guests of a hypervisor.
func Workloads(h lab.Hypervisor) []Workload {
	return slices.DeleteFunc(workloads(), func(w Workload) bool { return h == lab.Libvirt && w.program.spec(w.Memory) == nil })
}

func workloads() []Workload {
	return []Workload{
		idleLinux("idle-linux", 256*mib),
		{
			Name: "writer", Title: "flat guest, 99 MiB rewritten without pause", Memory: 128 * mib, Target: 0.5,
			program: flatProgram{flat.Config{Memory: 128 * mib, Pages: writerPages, Rate: flat.Unbounded}},
		},
		{
			Name: Smallest, Title: "flat guest, 8 MiB rewritten at 10 MiB/s", Memory: 32 * mib,
			program: flatProgram{flat.Config{Memory: 32 * mib, Pages: 2048, Rate: 2560}},
		},
		idleFlat("idle-256M", 256*mib),
		idleFlat("idle-1G", 1024*mib),
		idleFlat("idle-4G", 4096*mib),
	}
}

func idleFlat(name string, memory int64) Workload {
	return Workload{
		Name: name, Title: "flat guest, idle", Memory: memory, Idle: true, Family: "idle flat guest", Target: 1,
		program: flatProgram{flat.Config{Memory: memory}},
	}
}

func idleLinux(name string, memory int64) Workload {
	s := control.Defaults()
	s.Memory.Rate, s.Memory.CheckRate = 0, 0
	s.Tick = clockTick
	return Workload{
		Name: name, Title: "Linux, idle", Memory: memory, Idle: true, Family: "idle Linux",
		program: linuxProgram{s},
	}
}

// Link is what connects the hosts.
type Link struct {
	Name  string
	Title string
}

// Links are all there are.
func Links() []Link {
	return []Link{{Name: "veth", Title: "virtual Ethernet through a bridge, not shaped"}}
}

// Named picks entries by their names, in the order of the names; without names
// it returns nil. The second result is the first name that is none's.
func Named[T any](list []T, name func(T) string, names []string) (picked []T, unknown string) {
	for _, n := range names {
		found := false
		for _, x := range list {
			if name(x) == n {
				picked, found = append(picked, x), true
			}
		}
		if !found {
			return nil, n
		}
	}
	return picked, ""
}
