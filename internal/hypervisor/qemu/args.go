package qemu

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Descriptors that QEMU inherits. The taps of the NICs follow.
const (
	fdQMP = 3 + iota
	fdObserver
	fdConsole
	fdFirstTap
)

// memoryBackend is the id of the memory backend that holds the guest's RAM.
const memoryBackend = "ram0"

// launch is everything that a command line is made of.
type launch struct {
	def      *Definition
	run      *runRecord
	files    files
	devices  []bool // for each disk: a block device, not a file
	incoming bool   // a shell, waiting for the state of a guest
}

// arguments builds the command line, the same for the same guest on every host
// but for its paths: QEMU numbers PCI slots in this order, and a guest that
// moves must find its devices where they were.
func (l *launch) arguments() ([]string, error) {
	a := argumentList{args: []string{l.run.QEMU}}
	a.add("-name", "guest="+l.def.Name+",debug-threads=on")
	a.add("-uuid", l.def.UUID)
	a.add("-S", "-nodefaults", "-no-user-config")
	a.add("-display", "none", "-vga", "none")
	a.add("-msg", "timestamp=on")
	a.add("-action", "shutdown=pause,panic=pause")
	a.add("-rtc", "base=utc")
	if l.run.FirmwareDir != "" {
		a.add("-L", l.run.FirmwareDir)
	}
	l.machine(&a)
	l.sockets(&a)
	l.boot(&a)
	for i := range l.def.Disks {
		l.disk(&a, i)
	}
	for i := range l.def.NICs {
		l.nic(&a, i)
	}
	a.add(l.def.ExtraArguments...)
	if l.incoming {
		a.add("-incoming", "defer")
	}
	return a.args, a.err
}

func (l *launch) machine(a *argumentList) {
	size := int64(l.def.Memory)
	a.add("-machine", l.run.Machine+",memory-backend="+memoryBackend)
	a.add("-accel", string(l.run.Accelerator))
	a.add("-cpu", l.run.CPU)
	a.add("-smp", fmt.Sprintf("%d,sockets=1,cores=%d,threads=1", l.def.VCPUs, l.def.VCPUs))
	a.json("-object", object{
		"qom-type": "memory-backend-file", "id": memoryBackend, "size": size,
		"mem-path": l.files.memory, "share": true,
	})
	a.add("-m", fmt.Sprintf("size=%dk", size/1024))
}

func (l *launch) sockets(a *argumentList) {
	socket := func(id string, fd int, more string) {
		a.add("-chardev", fmt.Sprintf("socket,id=%s,fd=%d,server=on,wait=off%s", id, fd, more))
	}
	socket("qmp", fdQMP, "")
	a.add("-mon", "chardev=qmp,mode=control")
	socket("observer", fdObserver, "")
	a.add("-mon", "chardev=observer,mode=control")
	socket("console", fdConsole, ",logfile="+strings.ReplaceAll(l.files.consoleLog(), ",", ",,")+",logappend=on")
	a.add("-serial", "chardev:console")
}

func (l *launch) boot(a *argumentList) {
	if l.def.Firmware != "" {
		a.add("-bios", l.def.Firmware)
	}
	if l.def.Kernel != "" {
		a.add("-kernel", l.def.Kernel)
	}
	if l.def.Initrd != "" {
		a.add("-initrd", l.def.Initrd)
	}
	if l.def.Cmdline != "" {
		a.add("-append", l.def.Cmdline)
	}
	for i := range l.def.Disks {
		if l.def.Disks[i].Bus == "scsi" {
			a.json("-device", object{"driver": "virtio-scsi-pci", "id": "scsi0"})
			return
		}
	}
}

func (l *launch) disk(a *argumentList, i int) {
	disk := &l.def.Disks[i]
	id := "disk" + strconv.Itoa(i)
	cache := object{
		"direct":   disk.Cache == "none" || disk.Cache == "directsync",
		"no-flush": disk.Cache == "unsafe",
	}
	driver := "file"
	if l.devices[i] {
		driver = "host_device"
	}
	a.json("-blockdev", object{
		"driver": driver, "node-name": id + "-file", "filename": disk.Path,
		"aio": disk.AIO, "cache": cache, "read-only": disk.ReadOnly, "auto-read-only": false, "discard": "unmap",
	})
	a.json("-blockdev", object{
		"driver": disk.Format, "node-name": id, "file": id + "-file",
		"cache": cache, "read-only": disk.ReadOnly, "auto-read-only": false, "discard": "unmap",
	})
	device := object{"id": id + "-device", "drive": id}
	switch disk.Bus {
	case "ide":
		device["driver"] = "ide-hd"
	case "scsi":
		device["driver"], device["bus"] = "scsi-hd", "scsi0.0"
	default:
		device["driver"] = "virtio-blk-pci"
	}
	device["write-cache"] = "on"
	if disk.Cache == "writethrough" || disk.Cache == "directsync" {
		device["write-cache"] = "off"
	}
	if disk.Serial != "" {
		device["serial"] = disk.Serial
	}
	a.json("-device", device)
}

func (l *launch) nic(a *argumentList, i int) {
	nic := &l.def.NICs[i]
	id := "net" + strconv.Itoa(i)
	a.add("-netdev", fmt.Sprintf("tap,id=%s,fd=%d", id, fdFirstTap+i))
	// Without an option ROM: its size would tie the guest to the firmware
	// files of the host where it was started.
	a.json("-device", object{"driver": nic.Model, "id": id + "-device", "netdev": id, "mac": nic.MAC, "romfile": ""})
}

type object map[string]any

// argumentList is a command line in the making. An argument in JSON needs no
// quoting, whatever a path holds.
type argumentList struct {
	args []string
	err  error
}

func (a *argumentList) add(args ...string) { a.args = append(a.args, args...) }

func (a *argumentList) json(option string, o object) {
	b, err := json.Marshal(o)
	if err != nil && a.err == nil {
		a.err = fmt.Errorf("argument %s: %w", option, err)
	}
	a.add(option, string(b))
}

// blockDevices says for each disk whether it is a block device, and fails for
// one that is not there or is neither that nor a file.
func blockDevices(def *Definition) ([]bool, error) {
	devices := make([]bool, len(def.Disks))
	for i := range def.Disks {
		info, err := os.Stat(def.Disks[i].Path)
		if err != nil {
			return nil, fmt.Errorf("disk %d: %w", i, err)
		}
		switch mode := info.Mode(); {
		case mode.IsRegular():
		case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
			devices[i] = true
		default:
			return nil, fmt.Errorf("disk %d: %s is neither a file nor a block device", i, def.Disks[i].Path)
		}
	}
	return devices, nil
}
