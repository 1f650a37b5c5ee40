package main

import (
	"errors"
	"testing"

	"github.com/lmctl/lmctl/bench"
	"github.com/lmctl/lmctl/internal/lab"
)

func TestBenchPlan(t *testing.T) {
	f := benchFlags{hypervisor: lab.QEMU, runs: 7, workloads: []string{"writer", "idle-4G"}, contenders: []string{"floor", "lmctl"}}
	p, err := f.plan()
	if err != nil {
		t.Fatal(err)
	}
	if p.Runs != 7 || len(p.Workloads) != 2 || p.Workloads[1].Name != "idle-4G" || len(p.Contenders) != 2 || p.Contenders[0].Name != "floor" {
		t.Errorf("%+v", p)
	}
	f = benchFlags{hypervisor: lab.QEMU, smallest: true, runs: 7, workloads: []string{"writer"}}
	if p, err = f.plan(); err != nil || p.Runs != 1 || len(p.Workloads) != 1 || len(p.Contenders) != len(bench.Contenders(lab.QEMU)) {
		t.Errorf("the smallest: %+v, %v", p, err)
	}
}

func TestBenchPlanLibvirt(t *testing.T) {
	f := benchFlags{hypervisor: lab.Libvirt, runs: 10, workloads: []string{"idle-256M", "writer"}, contenders: []string{"lmctl", "virsh"}}
	p, err := f.plan()
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Contenders) != 2 || p.Contenders[1].Name != "virsh" || len(p.Workloads) != 2 || p.Workloads[0].Target != 1 || p.Workloads[1].Target != 0.5 {
		t.Errorf("%+v", p)
	}
}

func TestBenchPlanRefuses(t *testing.T) {
	for name, f := range map[string]benchFlags{
		"no runs":           {hypervisor: lab.QEMU, runs: 0, workloads: []string{"writer"}, contenders: []string{"lmctl"}},
		"unknown workload":  {hypervisor: lab.QEMU, runs: 1, workloads: []string{"nap"}, contenders: []string{"lmctl"}},
		"unknown contender": {hypervisor: lab.QEMU, runs: 1, workloads: []string{"writer"}, contenders: []string{"teleport"}},
		"not with libvirt":  {hypervisor: lab.Libvirt, runs: 1, workloads: []string{"idle-linux"}, contenders: []string{"lmctl"}},
		"not with QEMU":     {hypervisor: lab.QEMU, runs: 1, workloads: []string{"writer"}, contenders: []string{"virsh"}},
		"nothing":           {hypervisor: lab.QEMU, runs: 1, workloads: []string{"writer"}},
	} {
		var usage *usageError
		if _, err := f.plan(); !errors.As(err, &usage) {
			t.Errorf("%s: error %v, want one of usage", name, err)
		}
	}
}
