package qemu

import (
	"bytes"
	"fmt"
	"os"
)

// accelerate chooses what runs the guest and, with that, its default CPU.
func accelerate(def *Definition) (Accelerator, string, error) {
	accel := def.Accelerator
	virtualizes, err := cpuVirtualizes()
	if err != nil {
		return "", "", err
	}
	openable := openKVM()
	switch {
	case accel == AcceleratorAuto && virtualizes && openable == nil:
		accel = AcceleratorKVM
	case accel == AcceleratorAuto:
		accel = AcceleratorTCG
	case accel == AcceleratorKVM && openable != nil:
		return "", "", fmt.Errorf("KVM cannot be used on this host: %w; load the kvm module, or set accelerator: tcg", openable)
	}
	cpu := def.CPU
	if cpu == "" {
		cpu = "qemu64"
		if accel == AcceleratorKVM && virtualizes {
			cpu = "host"
		}
	}
	return accel, cpu, nil
}

// cpuVirtualizes says whether the CPU can run guests itself. Without that a
// /dev/kvm may still be there that emulates, too slow for any real guest.
func cpuVirtualizes() (bool, error) {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return false, fmt.Errorf("find out whether the CPU virtualizes: %w", err)
	}
	for line := range bytes.Lines(b) {
		key, flags, _ := bytes.Cut(line, []byte(":"))
		if string(bytes.TrimSpace(key)) != "flags" {
			continue
		}
		for _, flag := range bytes.Fields(flags) {
			if s := string(flag); s == "vmx" || s == "svm" {
				return true, nil
			}
		}
		return false, nil
	}
	return false, nil
}

func openKVM() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}
