package worker

// functions are the functions of the library that the worker program can call. The list has the
// same order as VDDK_FUNCTIONS in program/vddk.h.
var functions = []struct {
	name     string
	required bool
}{
	{"InitEx", true},
	{"Exit", true},
	{"GetErrorText", true},
	{"FreeErrorText", true},
	{"AllocateConnectParams", false},
	{"FreeConnectParams", false},
	{"ConnectEx", true},
	{"Disconnect", true},
	{"Open", true},
	{"Close", true},
	{"GetInfo", true},
	{"FreeInfo", true},
	{"GetTransportMode", false},
	{"ListTransportModes", false},
	{"Read", true},
	{"Write", false},
	{"ReadAsync", false},
	{"WriteAsync", false},
	{"Wait", false},
	{"Flush", false},
	{"QueryAllocatedBlocks", false},
	{"FreeBlockList", false},
	{"PrepareForAccess", false},
	{"EndAccess", false},
	{"Cleanup", false},
	{"ReadMetadata", false},
	{"GetMetadataKeys", false},
	{"Create", false},
	{"CheckRepair", false},
}

const functionPrefix = "VixDiskLib_"

// Functions returns all functions of the library that the worker program can call. The field
// Present is false in all of them, since no library is loaded.
func Functions() []Function { return listFunctions(0) }

// listFunctions returns all functions. The bits of the parameter present say which of them the
// library has: bit i stands for the function with index i in the list.
func listFunctions(present uint64) []Function {
	list := make([]Function, len(functions))
	for i, f := range functions {
		list[i] = Function{Name: functionPrefix + f.name, Required: f.required, Present: present>>i&1 == 1}
	}
	return list
}

// hasFunction reports whether the library has the function with the given full name. Bit i of the
// parameter present is set if the library has the function with index i in the list of functions.
func hasFunction(present uint64, name string) bool {
	for i, f := range functions {
		if functionPrefix+f.name == name {
			return present>>i&1 == 1
		}
	}
	return false
}

// missingFunctions returns the names of the required functions that the library lacks. Bit i of the
// parameter present is set if the library has the function with index i in the list of functions.
func missingFunctions(present uint64) []string {
	var missing []string
	for _, f := range listFunctions(present) {
		if f.Required && !f.Present {
			missing = append(missing, f.Name)
		}
	}
	return missing
}
