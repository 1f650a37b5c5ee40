package domain

import "libvirt.org/go/libvirtxml"

func (s Shape) devices(g Guest) *libvirtxml.DomainDeviceList {
	d := &libvirtxml.DomainDeviceList{
		Emulator: g.Emulator,
		// libvirt adds one that nobody asked for otherwise.
		Controllers: []libvirtxml.DomainController{{Type: "usb", Model: "none"}},
		MemBalloon:  &libvirtxml.DomainMemBalloon{Model: "none"},
	}
	if d.Emulator == "" {
		d.Emulator = DefaultEmulator
	}
	if g.Disk != "" {
		d.Disks = []libvirtxml.DomainDisk{s.disk(g.Disk)}
		if s.Bus == "scsi" {
			d.Controllers = append(d.Controllers, libvirtxml.DomainController{Type: "scsi", Model: "virtio-scsi"})
		}
	}
	if g.Bridge != "" {
		nic := libvirtxml.DomainInterface{
			Source: &libvirtxml.DomainInterfaceSource{Bridge: &libvirtxml.DomainInterfaceSourceBridge{Bridge: g.Bridge}},
			Model:  &libvirtxml.DomainInterfaceModel{Type: "virtio"},
		}
		if g.MAC != "" {
			nic.MAC = &libvirtxml.DomainInterfaceMAC{Address: g.MAC}
		}
		d.Interfaces = []libvirtxml.DomainInterface{nic}
	}
	if g.Console != "" {
		d.Serials = []libvirtxml.DomainSerial{{Source: &libvirtxml.DomainChardevSource{
			File: &libvirtxml.DomainChardevSourceFile{Path: g.Console, Append: "on"},
		}}}
	}
	s.extras(d)
	return d
}

// extras adds what a guest has that does not need it.
func (s Shape) extras(d *libvirtxml.DomainDeviceList) {
	if s.Balloon {
		d.MemBalloon = &libvirtxml.DomainMemBalloon{Model: "virtio", Stats: &libvirtxml.DomainMemBalloonStats{Period: 5}}
	}
	if s.RNG {
		d.RNGs = []libvirtxml.DomainRNG{{Model: "virtio", Backend: &libvirtxml.DomainRNGBackend{
			Random: &libvirtxml.DomainRNGBackendRandom{Device: "/dev/urandom"},
		}}}
	}
	if s.Watchdog {
		d.Watchdogs = []libvirtxml.DomainWatchdog{{Model: "i6300esb", Action: "reset"}}
	}
	if s.Channel {
		d.Channels = []libvirtxml.DomainChannel{{
			Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "bind"}},
			Target: &libvirtxml.DomainChannelTarget{VirtIO: &libvirtxml.DomainChannelTargetVirtIO{Name: "org.qemu.guest_agent.0"}},
		}}
	}
	if s.VGA {
		d.Videos = []libvirtxml.DomainVideo{{Model: libvirtxml.DomainVideoModel{Type: "vga", VRam: 16384, Heads: 1, Primary: "yes"}}}
		d.Graphics = []libvirtxml.DomainGraphic{{VNC: &libvirtxml.DomainGraphicVNC{Port: -1, AutoPort: "yes", Listeners: []libvirtxml.DomainGraphicListener{
			{Address: &libvirtxml.DomainGraphicListenerAddress{Address: "127.0.0.1"}},
		}}}}
	}
}

func (s Shape) disk(path string) libvirtxml.DomainDisk {
	bus, format, cache := s.Bus, s.Format, s.Cache
	if bus == "" {
		bus = "virtio"
	}
	if format == "" {
		format = "raw"
	}
	if cache == "" {
		cache = "none"
	}
	target := map[string]string{"virtio": "vda", "ide": "hda"}[bus]
	if target == "" {
		target = "sda"
	}
	return libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: format, Cache: cache, IO: s.AIO},
		Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: path}},
		Target: &libvirtxml.DomainDiskTarget{Dev: target, Bus: bus},
	}
}
