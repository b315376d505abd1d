package vspheretest_test

import (
	"fmt"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if g, w := fmt.Sprintf("%q", fmt.Sprint(got)), fmt.Sprintf("%q", fmt.Sprint(want)); g != w {
		t.Errorf("%s: got %s, want %s", what, g, w)
	}
}

func snapshotDisks(t *testing.T, c *govmomi.Client, ref types.ManagedObjectReference) ([][]string, error) {
	var snapshot mo.VirtualMachineSnapshot
	if err := c.RetrieveOne(t.Context(), ref, []string{"config.hardware.device"}, &snapshot); err != nil {
		return nil, err
	}
	return disks(snapshot.Config.Hardware.Device), nil
}
