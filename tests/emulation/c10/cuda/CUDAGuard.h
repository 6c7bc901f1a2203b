#pragma once  // device.cpp has what is needed of it
