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

func TestBenchPlanRefuses(t *testing.T) {
	for name, f := range map[string]benchFlags{
		"no runs":           {hypervisor: lab.QEMU, runs: 0, workloads: []string{"writer"}, contenders: []string{"lmctl"}},
		"unknown workload":  {hypervisor: lab.QEMU, runs: 1, workloads: []string{"nap"}, contenders: []string{"lmctl"}},
		"unknown contender": {hypervisor: lab.QEMU, runs: 1, workloads: []string{"writer"}, contenders: []string{"teleport"}},
		"nothing":           {hypervisor: lab.QEMU, runs: 1, workloads: []string{"writer"}},
	} {
		var usage *usageError
		if _, err := f.plan(); !errors.As(err, &usage) {
			t.Errorf("%s: error %v, want one of usage", name, err)
		}
	}
}
