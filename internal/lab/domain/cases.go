package domain

// Case is a shape with a guest for it.
type Case struct {
	Name string // fit for a test and for a domain
	// Linux says that a Linux guest with a network card is wanted: a shape
	// that only shows with a whole operating system. A flat guest otherwise.
	Linux  bool
	Memory int64
	VCPUs  int
	Shape  Shape
}

// aboveTheHole is memory of which part is above the PCI hole, on any machine.
const aboveTheHole = 4 << 30

// Cases are shapes of domains that between them have what migrations meet: each
// machine, bus, format, cache mode, kind of I/O, memory backing and device, and
// one and two CPUs.
func Cases() []Case {
	const small, ordinary = 128 << 20, 256 << 20
	everything := Shape{Balloon: true, RNG: true, Watchdog: true, Channel: true, VGA: true}
	on := func(s Shape, machine string) Shape { s.Machine = machine; return s }
	return []Case{
		{"pc-ide-raw-native", false, small, 1, Shape{Bus: "ide", AIO: "native"}},
		{"pc-virtio-qcow2-writeback-threads", false, small, 2, Shape{Format: "qcow2", Cache: "writeback", AIO: "threads"}},
		{"pc-scsi-raw-uring", false, small, 1, Shape{Bus: "scsi", AIO: "io_uring"}},
		{"q35-sata-raw-threads", false, small, 2, Shape{Machine: "q35", Bus: "sata", AIO: "threads"}},
		{"q35-virtio-qcow2-native", false, small, 1, Shape{Machine: "q35", Format: "qcow2", AIO: "native"}},
		{"q35-scsi-raw-writeback-uring", false, small, 1, Shape{Machine: "q35", Bus: "scsi", Cache: "writeback", AIO: "io_uring"}},
		{"pc-two-nodes", false, small, 2, Shape{Nodes: 2}},
		{"pc-above-the-hole", false, aboveTheHole, 1, Shape{}},
		{"q35-above-the-hole", false, aboveTheHole, 1, Shape{Machine: "q35"}},
		{"pc-everything", false, small, 2, everything},
		{"q35-everything", false, small, 1, on(everything, "q35")},
		{"pc-memfd", false, small, 1, Shape{Backing: Memfd}},
		{"q35-private", false, small, 1, Shape{Machine: "q35", Backing: Private}},
		{"pc-transient", false, small, 1, Shape{Transient: true}},
		{"linux-pc-raw-native", true, ordinary, 1, Shape{AIO: "native"}},
		{"linux-q35-qcow2-writeback-everything", true, ordinary, 2, func() Shape {
			s := on(everything, "q35")
			s.Format, s.Cache, s.AIO = "qcow2", "writeback", "io_uring"
			return s
		}()},
		{"linux-q35-uefi", true, ordinary, 1, Shape{Machine: "q35", UEFI: true}},
		{"linux-pc-two-nodes-memfd", true, ordinary, 2, Shape{Nodes: 2, Backing: Memfd}},
		{"linux-q35-transient", true, ordinary, 1, Shape{Machine: "q35", Transient: true}},
	}
}
